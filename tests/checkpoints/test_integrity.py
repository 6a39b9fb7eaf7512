"""Killed merges, flipped bits, and memory: the promises of a merge that streams."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import optax_moma as om
from optax_moma import checkpoints
from optax_moma.checkpoints import _orbax, _output
from optax_moma.checkpoints._source import manifest_path

ocp = pytest.importorskip("orbax.checkpoint").v1
ROOT = Path(__file__).parents[2]

# Merges in a process of its own that kills itself, whatever happens: at a named point, or a time
# after the merge began; at the latest when the merge is done.
KILLED = """
import os, signal, sys, threading
from pathlib import Path
from optax_moma import checkpoints
from optax_moma.checkpoints import _orbax, _output, _safetensors

recipe, output, moment = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def dies(where, name, before=0, after=0):
    "At the call of a function that has one of these numbers, before it or when it has returned."
    function, calls = getattr(where, name), []
    def dying(*arguments, **options):
        calls.append(name)
        if len(calls) == before:
            die()
        result = function(*arguments, **options)
        if len(calls) == after:
            die()
        return result
    setattr(where, name, dying)

def place(source, target):
    if Path(target) == output and moment == "before it has its place":
        die()
    replace(source, target)
    if Path(target) == output and moment == "after it has its place":
        die()

def finalize(path):
    threading.Timer(0.004, die).start()
    finalize_all(path)
    die()

if moment == "after the first part":
    dies(_orbax, "save_part", after=1)
elif moment == "before part 20":
    dies(_orbax, "save_part", before=20)
elif moment == "after tensor 5":
    dies(_safetensors.Writer, "sync", after=5)
elif moment == "after line 20":
    dies(_output.SafetensorsSink, "write", after=20)
elif moment == "before the parts are put together":
    dies(_orbax, "finalize", before=1)
elif moment == "while the parts are put together":
    finalize_all, _orbax.finalize = _orbax.finalize, finalize
elif moment == "before the manifest":
    dies(_output, "write_manifest", before=1)
elif moment.endswith("it has its place"):
    replace, os.replace = os.replace, place
else:
    threading.Timer(float(moment), die).start()
done = checkpoints.merge(recipe, output, chunk_bytes=1, force=True)
print(done.seconds, flush=True)
die()
"""
# How many leaves of 40 are found after each, when all happen to one merge, one after the other.
MOMENTS = {
    "out": {
        "after the first part": [1],
        "before part 20": [1 + 19],
        "before the parts are put together": [40],
        "while the parts are put together": [None, 40],
        "before the manifest": [40],
        "before it has its place": [40],
        "after it has its place": [0],
    },
    "out.safetensors": {
        "after tensor 5": [4],
        "after line 20": [4 + 20],
        "before the manifest": [40],
        "before it has its place": [40],
        "after it has its place": [0],
    },
}


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def many_leaves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    draw = lambda: {f"w{i}": rng.normal(size=(20, 30)).astype(np.float32) for i in range(40)}
    for name in ("base", "a", "b"):
        ocp.save(folder / name, draw())
    recipe = {"base": "base", "experts": {"a": "a", "b": "b"}, "method": "ties"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    checkpoints.merge(folder / "recipe.yaml", folder / "unbroken")
    return folder


def assert_like_unbroken(output, unbroken):
    """Leaves, their digests, and what the manifest says of the merge."""
    assert checkpoints.verify(output).problems == []
    assert not output.with_name(output.name + ".merging").exists()
    one, other = (checkpoints.load(path) for path in (output, unbroken))
    assert all(np.asarray(one[k]).tobytes() == np.asarray(other[k]).tobytes() for k in other)
    manifests = [json.loads(manifest_path(path).read_text()) for path in (output, unbroken)]
    for key in ("leaves", "inputs", "recipe", "versions"):
        assert manifests[0][key] == manifests[1][key]


def killed(recipe, output, moment):
    """Returns what it printed: nothing, if it was not done."""
    done = python(KILLED, recipe, output, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


def left_by(output):
    """How many leaves another run finds; None if what it finds is of no use."""
    notes = _output.sink_for(output).saved(_output.staging_of(output), output.name)
    return None if notes is None else sum(len(note["leaves"]) for note in notes)


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_again_and_again(many_leaves, name):
    """One merge, in the place of another: at the output is the old one or the new one, whole."""
    recipe, output = many_leaves / "recipe.yaml", many_leaves / name
    other = {"experts": {"a": str(many_leaves / "a")}, "method": "average"}
    checkpoints.merge(other, output)
    old, placed = checkpoints.load(output), False
    for moment, left in MOMENTS[name].items():
        assert killed(recipe, output, moment) == ""
        placed = placed or moment == "after it has its place"
        with pytest.raises(FileExistsError, match="replace it with force"):
            checkpoints.merge(recipe, output)
        assert left_by(output) in left, moment
        if placed:
            assert checkpoints.verify(output).problems == []
        found = checkpoints.load(output)
        expected = checkpoints.load(many_leaves / "unbroken") if placed else old
        assert all(np.array_equal(found[k], expected[k]) for k in old)
    checkpoints.merge(recipe, output, force=True, chunk_bytes=1)
    assert_like_unbroken(output, many_leaves / "unbroken")


@pytest.mark.parametrize("backwards", [False, True])
def test_parts_that_are_being_put_together_are_of_no_use(tmp_path, monkeypatch, backwards):
    """Whatever comes first in the folder: a part, or the notes that were in it."""
    path = tmp_path / "checkpoint"
    for name in "ab":
        _orbax.save_part(path, {name: np.ones(3)}, {"leaves": [name]})
    folder = tmp_path / "checkpoint.partial_save"
    assert sorted(note["leaves"] for note in _orbax.saved_parts(path)) == [["a"], ["b"]]
    part = next(folder.iterdir())
    (part / "_CHECKPOINT_METADATA").rename(folder / "_CHECKPOINT_METADATA")
    names = sorted(folder.iterdir(), key=lambda x: x.name, reverse=backwards)
    monkeypatch.setattr(type(folder), "iterdir", lambda _: iter(names))
    assert _orbax.saved_parts(path) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twenty", "twenty.safetensors"])
def test_killed_at_twenty_moments(many_leaves, name):
    """Each time from the start: nothing is at the output, and the second run completes it."""
    recipe, output = many_leaves / "recipe.yaml", many_leaves / name
    seconds = float(killed(recipe, output, "3600"))
    interrupted = 0
    for moment in np.random.default_rng(0).uniform(0, seconds, 20):
        shutil.rmtree(output, ignore_errors=True)
        if output.is_file():
            output.unlink()
        if not killed(recipe, output, moment):
            interrupted += 1
            if not output.exists():
                checkpoints.merge(recipe, output, chunk_bytes=1)
        shutil.rmtree(f"{output}.merging", ignore_errors=True)  # Killed while it cleared up.
        assert_like_unbroken(output, many_leaves / "unbroken")
    assert interrupted >= 5, "the merges were faster than the timers"


@pytest.mark.parametrize("name", ["synced", "synced.safetensors"])
def test_all_is_on_disk_before_it_has_its_place(many_leaves, monkeypatch, name):
    """And what the journal tells of, before the journal."""
    output, synced, waiting = many_leaves / name, [], []
    fsync, replace = os.fsync, os.replace

    def synced_now(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def placed(source, target):
        if Path(target) == output:
            paths = [Path(source), *Path(source).rglob("*"), Path(source).parent]
            waiting.extend(p.name for p in paths if p.stat().st_ino not in synced)
            if output.suffix:
                file, journal = (
                    os.stat(p).st_ino for p in (source, Path(source).with_name("journal.jsonl"))
                )
                steps = [x for x in synced if x in (file, journal)]
                assert steps[:80] == [file, journal] * 40
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced_now)
    monkeypatch.setattr(os, "replace", placed)
    checkpoints.merge(many_leaves / "recipe.yaml", output, chunk_bytes=1)
    assert waiting == [] and output.parent.stat().st_ino in synced


def test_what_is_resumed_is_checked(many_leaves):
    """Damage to what an interrupted run wrote does not reach the output; nor another recipe's."""
    recipe, output = many_leaves / "recipe.yaml", many_leaves / "checked"
    assert killed(recipe, output, "before the manifest") == ""
    staged = output.with_name("checked.merging")
    shutil.copytree(staged, many_leaves / "other.merging")
    custom = json.loads((staged / "checkpoint/_CHECKPOINT_METADATA").read_text())
    custom["custom_metadata"]["leaves"]["w3"] = "0" * 64
    (staged / "checkpoint/_CHECKPOINT_METADATA").write_text(json.dumps(custom))
    with pytest.raises(ValueError, match=r"w3 differs.*cleared away: merge again"):
        checkpoints.merge(recipe, output)
    assert not output.exists()
    assert checkpoints.merge(recipe, output).resumed == 0
    assert checkpoints.verify(output).problems == []

    other = {"experts": {n: str(many_leaves / n) for n in "ab"}, "method": "average"}
    assert checkpoints.merge(other, many_leaves / "other").resumed == 0
    a, b, merged = (checkpoints.load(many_leaves / n)["w0"] for n in ("a", "b", "other"))
    np.testing.assert_allclose(merged, (a + b) / 2, rtol=1e-6)


def test_a_safetensors_file_goes_on(many_leaves):
    """From the last whole line of the journal; what is damaged since is found."""
    recipe, output = many_leaves / "recipe.yaml", many_leaves / "on.safetensors"

    def interrupt(done, total):
        if done > 0.7 * total:
            raise KeyboardInterrupt

    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            checkpoints.merge(recipe, output, chunk_bytes=1, progress=interrupt)
        return output.with_name("on.safetensors.merging")

    journal = interrupted() / "journal.jsonl"
    whole = journal.read_text().count("\n")
    with journal.open("a") as file:
        file.write('{"leaves": {"w39"')
    assert 5 < whole < 40 and not output.exists()
    interrupted()
    done = checkpoints.merge(recipe, output, chunk_bytes=1)
    assert whole <= done.resumed < 40
    assert_like_unbroken(output, many_leaves / "unbroken")

    output.unlink()
    staged = interrupted() / "on.safetensors"
    first = len(staged.read_bytes()) - 40 * 20 * 30 * 4
    flip(staged, 8 * (first + 100))
    with pytest.raises(ValueError, match=r"w0 differs.*cleared away: merge again"):
        checkpoints.merge(recipe, output)


def test_two_merges_to_one_output(many_leaves):
    """The second is told, and nothing is written; a lock of a process that died holds nobody up."""
    recipe, output = many_leaves / "recipe.yaml", many_leaves / "contested"

    def second(done, total):
        if not refused:
            with pytest.raises(FileExistsError, match="Another merge is writing") as error:
                checkpoints.merge(recipe, output, force=True)
            refused.append(error)

    refused = []
    output.with_name("contested.merging.lock").touch()
    checkpoints.merge(recipe, output, progress=second)
    assert refused and checkpoints.verify(output).problems == []
    assert not output.with_name("contested.merging.lock").exists()


@pytest.mark.parametrize(
    "method", [[{"name": "drop", "density": 0.5}, "total"], "della", "moma"], ids=repr
)
def test_bits_do_not_depend_on_the_process(world, tmp_path, monkeypatch, method):
    """One device here, eight there; another PYTHONHASHSEED, order of experts, and chunks."""
    assert jax.device_count() == 8
    recipe = world.recipe(method, seed=3)
    if method == "moma":
        for expert in recipe["experts"]:
            recipe["experts"][expert] = {"path": str(world.folder / expert)}
            recipe["experts"][expert]["curvature"] = "opt_state"
    checkpoints.merge(recipe, tmp_path / "here", chunk_bytes=1)
    recipe["experts"] = dict(reversed(recipe["experts"].items()))
    code = "import jax, json, sys; from optax_moma import checkpoints\n"
    code += "assert jax.device_count() == 1\n"
    code += "checkpoints.merge(json.loads(sys.argv[1]), sys.argv[2])"
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    done = python(code, json.dumps(recipe), tmp_path / "there")
    assert done.returncode == 0, done.stderr
    here, there = (
        json.loads((tmp_path / n / "manifest.json").read_text())["leaves"]
        for n in ("here", "there")
    )
    assert here == there


@pytest.mark.parametrize("method", ["moma", "tsv_m"])
def test_sharded_checkpoints(world, tmp_path, equal_bits, method):
    """Saved from eight devices: merged and written sharded; with one device the same bits."""
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    spread = lambda x: jax.device_put(x, sharding) if x.ndim == 2 else x
    ocp.save(tmp_path / "base", jax.tree.map(spread, world.base))
    for name in world.experts:
        tree = {"params": world.experts[name], "opt_state": world.states[name]}
        ocp.save(tmp_path / name, jax.tree.map(spread, tree))
    recipe = {
        "base": str(tmp_path / "base"),
        "experts": {name: str(tmp_path / name) for name in world.experts},
        "method": method,
    }
    assert checkpoints.plan(recipe).problems == []
    checkpoints.merge(recipe, tmp_path / "here")
    code = "import json, sys; from optax_moma import checkpoints\n"
    code += "checkpoints.merge(json.loads(sys.argv[1]), sys.argv[2])"
    done = python(code, json.dumps(recipe), tmp_path / "there")
    assert done.returncode == 0, done.stderr
    curvature = world.curvature() if method == "moma" else None
    chosen = getattr(om.merging, method)()
    expected = om.merge(chosen, world.experts, base=world.base, curvature=curvature)
    for merged in ("here", "there"):
        equal_bits(checkpoints.load(tmp_path / merged), expected)

    written = jax.tree.leaves(ocp.metadata(tmp_path / "here").metadata)
    assert all(x.sharding == sharding for x in written if len(x.shape) == 2)
    # Whatever wrote it, it can be restored with any sharding.
    other = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("x", "y")))
    anywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=other if x.ndim == 2 else anywhere
        ),
        expected,
    )
    for merged in ("here", "there"):
        found = ocp.load(tmp_path / merged, wanted)
        equal_bits(found, expected)
        assert found["embedding"].sharding == other


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_any_flipped_bit_is_found(world, tmp_path, name):
    recipe = world.recipe("average", ignore=["blocks/**"])
    output = tmp_path / name
    checkpoints.merge(recipe, output)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    rng = np.random.default_rng()
    assert checkpoints.verify(output).problems == []
    for file in files:
        bit = int(rng.integers(8 * file.stat().st_size)) if file.stat().st_size else None
        if bit is None:
            continue
        flip(file, bit)
        assert checkpoints.verify(output).problems, (file, bit)
        flip(file, bit)
    assert checkpoints.verify(output).problems == []
    extra = output / "extra" if output.is_dir() else None
    if extra:
        extra.write_text("x")
        assert checkpoints.verify(output).problems == ["the file extra is not in the manifest"]


def test_a_flipped_bit_of_an_input_with_a_manifest(world, tmp_path):
    """Merge finds it too: the numbers are still numbers, only the digest tells."""
    checkpoints.merge(world.recipe("average", ignore=["blocks/**"]), tmp_path / "a.safetensors")
    recipe = {"method": "average", "experts": {"a": str(tmp_path / "a.safetensors")}}
    assert checkpoints.merge(recipe, tmp_path / "fine").leaves == 10
    file = tmp_path / "a.safetensors"
    flip(file, 8 * (file.stat().st_size - 100))
    with pytest.raises(ValueError, match=r"expert 'a'.*the bytes differ from the manifest"):
        checkpoints.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[1]", '{"leaves": ["w"]}', "no json", "{}"])
def test_a_manifest_of_another_tool(world, tmp_path, text):
    ocp.save(tmp_path / "a", {"w": np.ones(2)})
    (tmp_path / "a/manifest.json").write_text(text)
    recipe = {"experts": {"a": str(tmp_path / "a")}, "method": "average"}
    assert checkpoints.merge(recipe, tmp_path / "out").leaves == 1


def test_verify_needs_a_manifest(world):
    with pytest.raises(ValueError, match="has no manifest"):
        checkpoints.verify(world.folder / "base")
    with pytest.raises(ValueError, match="does not exist"):
        checkpoints.verify(world.folder / "nowhere")


PEAK = """
import json, re, sys
from pathlib import Path
from optax_moma import checkpoints
folder, recipe = sys.argv[1], sys.argv[1] + "/recipe.yaml"
predicted = checkpoints.plan(recipe, chunk_bytes=12 << 20).peak_bytes
checkpoints.merge(recipe, folder + "/out", chunk_bytes=12 << 20)
# Not getrusage, whose maximum a process inherits from the one that started it.
peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([peak, predicted]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("container", [dict, list])
def test_memory_does_not_grow_with_the_layers(tmp_path, container):
    """Layers of 4 MB; the second model has three times as many.

    Among the slow tests: a peak depends on the allocator and on what else the machine does, by some
    50 MB here, so only models much larger than that can tell.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell a process's peak memory")
    peaks = []
    for layers in (16, 48):
        folder = tmp_path / f"{layers}"
        rng = np.random.default_rng(0)
        for name in ("base", "a", "b"):
            drawn = [rng.random((1024, 1024), np.float32) for _ in range(layers)]
            named = {f"w{i}": x for i, x in enumerate(drawn)}
            ocp.save(folder / name, {"layers": drawn if container is list else named})
        recipe = {"base": "base", "experts": {"a": "a", "b": "b"}, "method": "ties"}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        done = python(PEAK, folder)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout))
    (small, _), (large, predicted) = peaks
    assert large < small + 32 * 3 * (4 << 20) / 4  # a quarter of what was added
    assert large < 1.2 * predicted
