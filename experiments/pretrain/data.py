"""Text in, packed tokens out: the same batches for any number of processes, from any position.

A corpus is a folder of text files, parquet files, or a Hugging Face dataset such as FineWeb:

    OPTAX_MOMA_DATA/lm      every *.txt and *.txt.gz, documents parted by lines of a single \\x1e;
                            README.md says what is there
    corpus/*.parquet        a column "text"
    fineweb:sample-10BT     streamed; also any other dataset as owner/name:configuration

Training text flows in lanes. A lane reads its own share of the documents, tokenizes them, joins
them to one stream and cuts that into sequences; each lane fills its own rows of every batch. Which
process holds a lane changes nothing, and a position is the list of the lanes' positions. Whole
documents are held out for validation, chosen by a hash of their text, a share of every source.
"""

import functools
import glob
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "\x1e"
END = "<|endoftext|>"
HELD_OUT = 0.01
"""Share of a source's documents held out, at least one."""
PIECE = 8
"""Longer documents are cut after this many characters per token of a sequence, about two sequences,
and the pieces shuffled, so that a book does not fill a run."""
SAMPLE = 16_000_000
"""Characters that a tokenizer is trained on."""
SAMPLE_PIECE = 2048
"""Characters of the pieces of long documents among them."""
PUBLIC = {"fineweb": "HuggingFaceFW/fineweb"}


class Corpus(NamedTuple):
    """Where text comes from.

    Attributes:
      lane: (lane, lanes, seed) -> an endless Grain dataset of one lane's training texts.
      sample: training texts to train a tokenizer on.
      held_out: by source, the documents held out for validation.
    """

    lane: Callable[[int, int, int], grain.IterDataset]
    sample: Callable[[], Iterable[str]]
    held_out: Mapping[str, Iterable[str]]


def open_corpus(where: str, length: int) -> Corpus:
    """The corpus at a folder, a pattern of parquet files, or a public dataset's ``name:config``.

    Empty: the folder ``lm`` of OPTAX_MOMA_DATA. Sequences will have ``length`` tokens.
    """
    if not where:
        if "OPTAX_MOMA_DATA" not in os.environ:
            raise ValueError(
                "No corpus: give --corpus a folder of text, parquet files or fineweb:sample-10BT,"
                " or set OPTAX_MOMA_DATA to a folder that holds lm/*.txt.gz."
            )
        where = str(Path(os.environ["OPTAX_MOMA_DATA"]) / "lm")
    if Path(where).is_dir():
        return folder(Path(where), PIECE * length)
    import datasets  # only streams need it

    if where.endswith(".parquet"):
        files = sorted(glob.glob(where))
        if not files:
            raise ValueError(f"No parquet file matches {where!r}.")
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        return stream("parquet", rows)
    name, _, config = where.partition(":")
    if name not in PUBLIC and "/" not in name:
        raise ValueError(f"{where!r} is no folder, no *.parquet and no owner/name of a dataset.")
    rows = datasets.load_dataset(
        PUBLIC.get(name, name), config or None, split="train", streaming=True
    )
    return stream(name, rows)


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: copies of a document share it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) / 2**56


def pieces(text: str, size: int) -> Iterator[str]:
    """A document, or the parts of a long one, cut at the ends of lines where there are any."""
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start + 1, start + size) + 1 or start + size
        yield text[start:end]
        start = end
    yield text[start:]


def folder(path: Path, piece: int) -> Corpus:
    """Every text file of a folder is a source."""
    files = sorted([*path.glob("*.txt"), *path.glob("*.txt.gz")])
    if not files:
        raise ValueError(f"{path} holds no *.txt or *.txt.gz.")
    kept, held_out = [], {}
    for file in files:
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8") as lines:
            documents = [d.strip("\n") for d in lines.read().split(f"\n{SEPARATOR}\n")]
        marks = [fraction(d) for d in documents]
        limit = sorted(marks)[max(1, round(HELD_OUT * len(marks))) - 1]
        marked = sorted(zip(marks, documents, strict=True))
        held_out[file.name.split(".")[0]] = [d for mark, d in marked if mark <= limit]
        kept += [d for mark, d in zip(marks, documents, strict=True) if mark > limit]
    training = [part for d in kept for part in pieces(d, piece)]

    def lane(index: int, lanes: int, seed: int) -> grain.IterDataset:
        mine = grain.MapDataset.source(training)[index::lanes]
        ordered = mine.seed(seed + 1).shuffle().repeat()
        # Texts lie in memory: nothing is won by reading them ahead in threads.
        return ordered.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    def sample() -> Iterator[str]:
        # Cut in one way: runs of all lengths train the same tokenizer.
        parts = [part for d in kept for part in pieces(d, SAMPLE_PIECE)]
        return (parts[i] for i in np.random.default_rng(0).permutation(len(parts)))

    return Corpus(lane, sample, held_out)


def stream(name: str, rows: Any) -> Corpus:
    """A Hugging Face ``IterableDataset`` with a column ``text``, read in its own order."""
    rows = rows.select_columns(["text"])
    is_held_out = lambda text: fraction(text) < HELD_OUT  # noqa: E731

    def lane(index: int, lanes: int, seed: int) -> grain.IterDataset:
        from datasets.distributed import split_dataset_by_node

        if rows.num_shards >= lanes:  # files of its own, if some lanes have one more than others
            mine = rows.shard(lanes, index).repeat(None)
        else:  # every file, of which it keeps its share of the rows
            mine = split_dataset_by_node(rows.repeat(None), index, lanes)
        return Rows(mine).filter(lambda text: not is_held_out(text))

    def texts(held_out: bool) -> Iterator[str]:
        return (r["text"] for r in rows if is_held_out(r["text"]) == held_out)

    return Corpus(
        lane, functools.partial(texts, False), {name: Texts(functools.partial(texts, True))}
    )


class Texts(NamedTuple):
    """An iterable that starts anew every time."""

    make: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A new iterator."""
        return self.make()


class Rows(grain.IterDataset):
    """A Hugging Face stream of texts as a Grain dataset, position included."""

    def __init__(self, rows: Any):
        """Reads ``rows``, a ``datasets.IterableDataset``."""
        super().__init__()
        self._rows = rows

    def __iter__(self) -> "RowsIterator":
        """Starts at the beginning."""
        return RowsIterator(self._rows)


class RowsIterator(grain.DatasetIterator):
    """Where a lane is in a Hugging Face stream."""

    def __init__(self, rows: Any):
        """Starts at the beginning."""
        super().__init__()
        self._rows = rows
        self._iterator = iter(rows)

    def __next__(self) -> str:
        """The next text."""
        return next(self._iterator)["text"]

    def get_state(self) -> dict[str, Any]:
        """The stream's own account of its position."""
        return {"rows": self._rows.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._rows.load_state_dict(state["rows"])
        self._iterator = iter(self._rows)


def first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts up to the one that fills so many characters; nothing after it is read."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def find_tokenizer(corpus: Corpus, vocabulary: int, path: Path) -> Tokenizer:
    """Loads the byte-level BPE at ``path``, or trains one on the corpus and saves it there."""
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(first(corpus.sample(), SAMPLE), trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        tokenizer.save(str(part))
        part.rename(path)  # whole or not at all
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() > vocabulary:
        raise ValueError(
            f"{path} knows {tokenizer.get_vocab_size()} tokens, the model {vocabulary}."
        )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of one text, after the token that ends the one before."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return np.array([tokenizer.token_to_id(END), *ids], np.int32)


def validation(
    corpus: Corpus, tokenizer: Tokenizer, length: int, sequences: int
) -> dict[str, np.ndarray]:
    """By source, packed tokens (at most ``sequences``, length + 1) of held-out documents."""
    found = {}
    for source, documents in corpus.held_out.items():
        tokens, wanted = np.zeros(0, np.int32), sequences * (length + 1)
        for document in documents:
            # No token is longer than this on average: a whole book need not be tokenized.
            tokens = np.append(tokens, encode(tokenizer, document[: 16 * wanted]))
            if len(tokens) >= wanted:
                break
        count = min(sequences, len(tokens) // (length + 1))
        if count:
            found[source] = tokens[: count * (length + 1)].reshape(count, length + 1)
    if not found:
        raise ValueError(f"The held-out documents do not fill one sequence of {length + 1} tokens.")
    return found


class Packed(grain.IterDataset):
    """Arrays of tokens joined to one stream, which is cut into sequences of one size.

    Grain's own ConcatThenSplitIterDataset (0.2.18) restores a wrong position where a sequence and a
    text end together.
    """

    def __init__(self, texts: grain.IterDataset, size: int):
        """Packs ``texts`` into sequences of ``size`` tokens."""
        super().__init__(texts)
        self._size = size

    def __iter__(self) -> "PackedIterator":
        """Starts at the beginning."""
        return PackedIterator(iter(self._parent), self._size)


class PackedIterator(grain.DatasetIterator):
    """Where packing is: what is left of the last text, and where that text was found."""

    def __init__(self, texts: grain.DatasetIterator, size: int):
        """Starts with nothing left."""
        super().__init__(texts)
        self._size, self._left = size, np.zeros(0, np.int32)
        self._before, self._length = texts.get_state(), 0

    def _read(self) -> np.ndarray:
        self._before = self._parent.get_state()
        text = next(self._parent)
        self._length = len(text)
        return text

    def __next__(self) -> np.ndarray:
        """The next sequence."""
        while len(self._left) < self._size:
            self._left = np.append(self._left, self._read())
        sequence, self._left = self._left[: self._size], self._left[self._size :]
        return sequence

    def get_state(self) -> dict[str, Any]:
        """The last text's place, and how much of it is used: after a sequence, only it is left."""
        return {"before": self._before, "used": self._length - len(self._left)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._parent.set_state(state["before"])
        self._left, self._length = np.zeros(0, np.int32), 0
        if state["used"]:
            self._left = self._read()[state["used"] :]


class Batches:
    """An endless iterator over global batches, int32 arrays (rows, length + 1) on a mesh."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        sharding: NamedSharding,
        rows: int,
        length: int,
        lanes: int,
        seed: int,
    ):
        """Opens the lanes whose rows this process's devices hold."""
        if rows % lanes:
            raise ValueError(f"A batch of {rows} rows cannot be filled by {lanes} equal lanes.")
        self._shape, self._sharding, self._share = (rows, length + 1), sharding, rows // lanes
        places = sharding.addressable_devices_indices_map(self._shape).values()
        spans = [index[0].indices(rows) for index in places if index is not None]
        mine = sorted({row // self._share for span in spans for row in range(*span)})

        def open_lane(lane: int) -> grain.DatasetIterator:
            tokens = corpus.lane(lane, lanes, seed).map(functools.partial(encode, tokenizer))
            batched = Packed(tokens, length + 1).batch(self._share)
            return iter(ThreadPrefetchIterDataset(batched, prefetch_buffer_size=2))

        self._lanes = {lane: open_lane(lane) for lane in mine}

    def __iter__(self) -> "Batches":
        """Itself."""
        return self

    def __next__(self) -> jax.Array:
        """The next global batch; each process makes its own part of it."""
        batch = np.zeros(self._shape, np.int32)
        for lane, iterator in self._lanes.items():
            batch[lane * self._share : (lane + 1) * self._share] = next(iterator)
        return jax.make_array_from_callback(self._shape, self._sharding, batch.__getitem__)

    def close(self) -> None:
        """Ends the threads that read ahead."""
        for iterator in self._lanes.values():
            iterator.close()

    def position(self) -> list[str]:
        """Every lane's position, of all processes, as JSON."""
        own = {str(lane): iterator.get_state() for lane, iterator in self._lanes.items()}
        everyone: dict[str, Any] = {}
        for part in gather(json.dumps(own, default=lambda x: x.item())):
            everyone |= json.loads(part)
        return [json.dumps(everyone[lane]) for lane in sorted(everyone, key=int)]

    def go_to(self, position: list[str]) -> None:
        """Continues from a position, of any number of processes."""
        for lane, iterator in self._lanes.items():
            iterator.set_state(json.loads(position[lane]))


def gather(text: str) -> list[str]:
    """The texts of all processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, int(max(sizes)) - len(data)))
    everyone = multihost_utils.process_allgather(padded)
    return [bytes(x[:n]).decode() for x, n in zip(everyone, sizes, strict=True)]
