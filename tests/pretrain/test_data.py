"""Batches: whole texts, no padding, the same from any position and in any number of processes."""

import itertools
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer

from experiments.pretrain import data

LENGTH, ROWS, LANES = 32, 8, 4


@pytest.fixture(scope="module")
def parquet(corpus, tmp_path_factory):
    """The same documents as two parquet files, which are read as a stream."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path_factory.mktemp("parquet")
    for file in sorted(corpus.glob("*.txt")):
        documents = file.read_text().split("\n\x1e\n")
        pyarrow.parquet.write_table(arrow.table({"text": documents}), path / f"{file.stem}.parquet")
    return path


@pytest.fixture(scope="module")
def places(corpus, parquet):
    return {"folder": str(corpus), "parquet": str(parquet / "*.parquet")}


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    return data.find_tokenizer(data.open_corpus(str(corpus), LENGTH), 300, path)


@pytest.fixture(scope="module")
def sharding() -> NamedSharding:
    return NamedSharding(jax.make_mesh((4, 2), ("data", "tensor")), P("data"))


@pytest.fixture
def start(places, tokenizer, sharding):
    """Opens the batches of a corpus, and closes them after the test."""
    opened = []

    def open_batches(kind: str, seed: int = 0) -> data.Batches:
        corpus = data.open_corpus(places[kind], LENGTH)
        opened.append(data.Batches(corpus, tokenizer, sharding, ROWS, LENGTH, LANES, seed))
        return opened[-1]

    yield open_batches
    for batches in opened:
        batches.close()


def texts_of(rows: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts that begin and end within a lane's stream of tokens."""
    tokens = rows.reshape(-1)
    ends = np.flatnonzero(tokens == tokenizer.token_to_id(data.END))
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_lane_is_whole_texts_of_the_training_part(kind, start, places, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 0.1)  # few documents: one in a hundred may be none
    batches = start(kind)
    taken = np.stack([np.asarray(next(batches)) for _ in range(80)])
    assert taken.shape == (80, ROWS, LENGTH + 1)
    corpus = data.open_corpus(places[kind], LENGTH)
    held_out = {text for documents in corpus.held_out.values() for text in documents}
    allowed, seen = set(corpus.sample()), []
    if kind == "folder":  # whose texts are pieces of documents, cut for this length
        files = [file.read_text() for file in Path(places[kind]).glob("*.txt")]
        documents = {d for text in files for d in text.split(f"\n{data.SEPARATOR}\n")} - held_out
        allowed = {part for d in documents for part in data.pieces(d, data.PIECE * LENGTH)}
    for lane in range(LANES):
        share = slice(lane * ROWS // LANES, (lane + 1) * ROWS // LANES)
        found = texts_of(taken[:, share], tokenizer)
        assert len(found) > 2
        assert set(found) <= allowed
        seen.append(set(found))
    # Lanes part the documents among themselves.
    assert not any(seen[i] & seen[j] for i in range(LANES) for j in range(i))
    assert held_out
    assert not any(text in document for text in allowed for document in held_out)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_goes_on_from_any_position(kind, start):
    """From each of many: some are where a sequence and a text end together."""
    batches, positions, expected = start(kind), [], []
    for _ in range(60):
        positions.append(batches.position())
        expected.append(np.asarray(next(batches)))
    again = start(kind)
    for step in range(58):
        again.go_to(positions[step])
        for batch in expected[step : step + 2]:
            np.testing.assert_array_equal(next(again), batch)


def test_packing_goes_on_where_a_sequence_and_a_text_end_together():
    texts = [np.arange(n) + 100 * n for n in (3, 5, 8, 4, 20, 1, 3)]
    packed = data.Packed(grain.MapDataset.source(texts).to_iter_dataset(), 4)
    whole = np.concatenate(texts)
    expected = whole.reshape(-1, 4)
    np.testing.assert_array_equal(np.stack(list(packed)), expected)
    for step in range(len(expected)):
        iterator, again = iter(packed), iter(packed)
        for _ in range(step):
            next(iterator)
        again.set_state(iterator.get_state())
        np.testing.assert_array_equal(np.stack(list(again)), expected[step:])


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_does_not_end(kind, start):
    batches = start(kind)
    for _ in range(400):  # some epochs
        batch = next(batches)
    assert batch.shape == (ROWS, LENGTH + 1)


def test_the_seed_decides_the_order(start):
    first, same, other = (np.asarray(next(start("folder", seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert np.any(first != other)


def test_a_process_opens_only_the_lanes_of_its_rows(places, tokenizer, sharding):
    """Lanes make the same rows whoever holds them: what several processes rely on."""
    corpus = data.open_corpus(places["folder"], LENGTH)
    whole = data.Batches(corpus, tokenizer, sharding, ROWS, LENGTH, LANES, 0)
    few = NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))
    part = data.Batches(corpus, tokenizer, few, ROWS, LENGTH, LANES, 0)
    for lane in (0, 3):
        part._lanes.pop(lane).close()
    expected, found = np.asarray(next(whole)), np.asarray(next(part))
    np.testing.assert_array_equal(found[2:6], expected[2:6])
    assert not found[:2].any() and not found[6:].any()
    whole.close()
    part.close()


def test_validation_is_of_every_source_and_whole_documents(corpus, tokenizer):
    opened = data.open_corpus(str(corpus), LENGTH)
    found = data.validation(opened, tokenizer, LENGTH, sequences=3)
    assert list(found) == ["essays", "letters"]
    for source, rows in found.items():
        document = opened.held_out[source][0]
        tokens = rows.reshape(-1)
        assert tokens[0] == tokenizer.token_to_id(data.END)
        text = tokenizer.decode(tokens[1:].tolist())
        assert document.startswith(text) or text.startswith(document)
        assert rows.shape[1] == LENGTH + 1 and 1 <= len(rows) <= 3


def test_copies_of_a_document_stay_together(tmp_path):
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("abc "), 50)) for _ in range(100)] * 2
    (tmp_path / "twice.txt").write_text("\n\x1e\n".join(documents))
    opened = data.open_corpus(str(tmp_path), LENGTH)
    held_out = opened.held_out["twice"]
    assert len(held_out) == 2 and held_out[0] == held_out[1]
    assert held_out[0] not in set(opened.sample())


def test_pieces_join_to_the_document():
    text = "\n".join("x" * n for n in (3, 30, 7, 7, 200, 1))
    parts = list(data.pieces(text, 40))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 40
    assert parts[0] == "x" * 3 + "\n" + "x" * 30 + "\n"


@pytest.mark.parametrize(
    ("where", "said"),
    [("nowhere", "no folder"), ("none/*.parquet", "No parquet file"), ("", "OPTAX_MOMA_DATA")],
)
def test_says_what_is_missing(where, said, monkeypatch):
    monkeypatch.delenv("OPTAX_MOMA_DATA", raising=False)
    with pytest.raises(ValueError, match=said):
        data.open_corpus(where, LENGTH)


def test_a_tokenizer_does_not_depend_on_the_length_of_sequences(corpus):
    short, long = (list(data.open_corpus(str(corpus), n).sample()) for n in (4, 64))
    assert short == long and len("".join(short)) > 10_000


def test_a_tokenizer_reads_no_more_than_its_sample(corpus, tmp_path, monkeypatch):
    """Of a corpus that never ends."""
    monkeypatch.setattr(data, "SAMPLE", 1000)
    read = []

    def endless():
        while True:
            read.append("a few words, again and again")
            yield read[-1]

    opened = data.open_corpus(str(corpus), LENGTH)._replace(sample=endless)
    data.find_tokenizer(opened, 280, tmp_path / "bpe.json")
    assert sum(map(len, read[:-1])) < 1000 <= sum(map(len, read))


@pytest.mark.parametrize(("lanes", "files"), [(2, [{0, 1, 2}, {3, 4}]), (6, [{0, 1, 2, 3, 4}] * 6)])
def test_lanes_read_files_of_their_own_where_there_are_enough(lanes, files, tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    monkeypatch.setattr(data, "HELD_OUT", 0.0)
    for i in range(5):
        table = arrow.table({"text": [f"file {i} text {j}" for j in range(6)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{i}.parquet")
    opened, seen = data.open_corpus(str(tmp_path / "*.parquet"), LENGTH), []
    for lane in range(lanes):
        texts = list(itertools.islice(opened.lane(lane, lanes, 0), 30 if lanes == 2 else 5))
        assert {int(text.split()[1]) for text in texts} == files[lane]
        seen.append(set(texts))
        started, again = (iter(opened.lane(lane, lanes, 0)) for _ in range(2))
        assert [next(started) for _ in range(4)] == texts[:4]
        again.set_state(started.get_state())
        assert next(again) == next(started) == texts[4]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 30


def test_says_that_a_tokenizer_is_too_large(corpus, tokenizer, tmp_path):
    path = tmp_path / "bpe.json"
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match="300 tokens, the model 280"):
        data.find_tokenizer(data.open_corpus(str(corpus), LENGTH), 280, path)
