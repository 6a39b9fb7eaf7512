"""Fetching: pip's configuration is honoured, hashes are checked, errors say what to place where."""

import hashlib
import os
import zipfile

import pytest

from optax_moma.demo import files
from optax_moma.demo.files import ENCODER, TEXTS, FetchError, Source, default_cache, fetch


@pytest.fixture
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def wheel(folder):
    """A minimal wheel, and its source."""
    folder.mkdir()
    path = folder / "moma_demo_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        info = "moma_demo_probe-1.0.dist-info"
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: moma-demo-probe\nVersion: 1.0\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source("moma-demo-probe==1.0", path.name, digest, "a probe", wheel=True)


def test_downloads_with_pip_as_it_is_configured(tmp_path, offline, monkeypatch):
    source = wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    cache = tmp_path / "new" / "cache"
    path = fetch(source, cache)
    assert path == cache / source.filename
    assert [p.name for p in cache.iterdir()] == [source.filename]
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch(source, cache) == path


def test_a_download_with_another_hash_is_refused(tmp_path, offline, monkeypatch):
    source = wheel(tmp_path / "index")._replace(sha256="0" * 64)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(FetchError, match="could not download moma-demo-probe"):
        fetch(source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_network_the_error_says_what_to_place_where(tmp_path, offline):
    with pytest.raises(FetchError) as caught:
        fetch(TEXTS, tmp_path)
    said = str(caught.value)
    assert f"Place in {tmp_path}" in said
    for source in (ENCODER, TEXTS):
        assert source.filename in said and source.sha256 in said and source.requirement in said
    assert "--no-binary :all: vaderSentiment==3.3.2" in said
    assert "pip: " in said


def test_only_what_is_missing_is_asked_for(tmp_path, offline):
    (tmp_path / ENCODER.filename).touch()
    with pytest.raises(FetchError) as caught:
        fetch(TEXTS, tmp_path)
    assert ENCODER.filename not in str(caught.value)


def test_a_tampered_file_is_refused_and_kept(tmp_path):
    path = tmp_path / TEXTS.filename
    path.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(FetchError) as caught:
        fetch(TEXTS, tmp_path)
    assert found in str(caught.value) and TEXTS.sha256 in str(caught.value)
    assert str(path) in str(caught.value) and "Delete it" in str(caught.value)
    assert path.read_bytes() == b"something else"


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTAX_MOMA_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
    monkeypatch.delenv("OPTAX_MOMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "optax_moma"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(files.Path, "home", lambda: tmp_path / "home")
    assert default_cache() == tmp_path / "home" / ".cache" / "optax_moma"
