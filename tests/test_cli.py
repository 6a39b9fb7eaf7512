"""The command line: help, options, exit codes and messages."""

import builtins
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from optax_moma.cli import app
from optax_moma.demo import pipeline
from optax_moma.demo.files import FetchError
from optax_moma.demo.training import Settings


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_help_names_every_option():
    result = invoke("demo", "--help")
    assert result.exit_code == 0
    for word in ("--quick", "--seed", "--output", "--cache", "OPTAX_MOMA_CACHE", "table.csv"):
        assert word in result.output
    assert "demo" in invoke("--help").output


def test_options_reach_the_run(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(pipeline, "load_problem", lambda *args: calls.append(args) or "problem")
    monkeypatch.setattr(pipeline, "run", lambda *args: calls.append(args))
    result = invoke(
        "demo", "--seed", "7", "--output", str(tmp_path), "--cache", str(tmp_path / "c")
    )
    assert result.exit_code == 0, result.output
    assert calls[0] == (tmp_path / "c", Settings(seed=7))
    assert calls[1][:3] == ("problem", Settings(seed=7), tmp_path / "seed-7")
    assert "seed-7" in result.output and "figure.png" in result.output
    invoke("demo", "--quick", "--output", str(tmp_path))
    assert calls[3][1:3] == (pipeline.QUICK, tmp_path / "quick-0")


def test_a_file_that_cannot_be_fetched_is_exit_code_2(monkeypatch, tmp_path):
    def unfetched(*_):
        raise FetchError("Place in [cache]\n  the wheel")

    monkeypatch.setattr(pipeline, "load_problem", unfetched)
    result = invoke("demo", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "error: Place in [cache]\n  the wheel" in result.output
    assert "Traceback" not in result.output


def test_an_interruption_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_problem", lambda *_: None)
    monkeypatch.setattr(pipeline, "run", interrupted)
    result = invoke("demo", "--output", str(tmp_path))
    assert result.exit_code == 130
    assert "goes on from the experts already trained" in result.output


@pytest.mark.parametrize("package", ["flax", "tokenizers", "orbax", "matplotlib", "safetensors"])
def test_a_missing_extra_is_exit_code_2(monkeypatch, package):
    for name in [n for n in sys.modules if n.startswith("optax_moma.demo")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    result = invoke("demo")
    assert result.exit_code == 2
    assert f"No module named '{package}'" in result.output
    assert "pip install 'optax-moma[demo]'" in result.output


def test_without_typer_the_message_names_the_extra():
    code = "import sys; sys.modules['typer'] = None; import optax_moma, optax_moma.cli"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert "optax-moma[cli]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["demo", "--seed", "-1"], ["demo", "--seed", "x"], ["nope"]])
def test_wrong_usage_is_exit_code_2(arguments):
    assert invoke(*arguments).exit_code == 2
