"""Small grey images of ten classes: Fashion-MNIST, MNIST's test images, scikit-learn's digits."""

import gzip
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

SIDE = 14
"""Images are 14 x 14: of 28 x 28, means of 2 x 2 pixels."""
PLACES = ("vision/fashion_mnist", "/usr/share/datasets/fashion-mnist")
"""Where Fashion-MNIST is looked for: under OPTAX_MOMA_DATA, and where Debian's package puts it."""


class DataError(Exception):
    """The images are not where they should be; the message says what to do."""


class Images(NamedTuple):
    """Examples: ``x`` (n, SIDE, SIDE) in [0, 1], ``y`` (n,) from 0 to 9."""

    x: np.ndarray
    y: np.ndarray


class Split(NamedTuple):
    """What is trained on, what is chosen on, and what is only reported."""

    train: Images
    dev: Images
    test: Images


def fashion(train: int = 20_000, dev: int = 5_000) -> Split:
    """Fashion-MNIST: the first and the last of the 60,000 training images; all 10,000 of test.

    Raises:
      DataError: a file is missing.
    """
    data = os.environ.get("OPTAX_MOMA_DATA")
    places = [Path(data or ".", place) for place in PLACES if data or place.startswith("/")]
    for place in places:
        if (place / "train-images-idx3-ubyte.gz").exists():
            whole, test = read_pair(place, "train"), read_pair(place, "t10k")
            first, last = slice(train), slice(-dev, None)
            return Split(*(Images(whole.x[s], whole.y[s]) for s in (first, last)), test)
    raise DataError(
        f"Fashion-MNIST is not in {' or '.join(map(str, places))}. On Debian: apt-get install"
        " dataset-fashion-mnist. Elsewhere: put the four *-ubyte.gz files of"
        " https://github.com/zalandoresearch/fashion-mnist (MIT licence) into the folder"
        f" {PLACES[0]} of OPTAX_MOMA_DATA."
    )


def mnist() -> Images:
    """The 10,000 test images of MNIST.

    Raises:
      DataError: a file is missing.
    """
    folder = Path(os.environ.get("OPTAX_MOMA_DATA", "."), "vision", "mnist_t10k")
    return read_pair(folder, "t10k")


def digits() -> Images:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn ships, enlarged."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    place = np.linspace(0, 7, SIDE)
    low = np.minimum(place.astype(int), 6)
    weight = np.zeros((SIDE, 8))
    weight[np.arange(SIDE), low] = 1 - (place - low)
    weight[np.arange(SIDE), low + 1] = place - low
    enlarged = np.einsum("ij,njk,lk->nil", weight, x.reshape(-1, 8, 8) / 16, weight)
    return Images(enlarged.astype(np.float32), y.astype(np.int32))


def read_pair(folder: Path, name: str) -> Images:
    """Images and labels of one split, as MNIST's authors lay them out.

    Raises:
      DataError: a file is missing.
    """
    try:
        x = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
        y = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is missing: the files of MNIST (https://yann.lecun.com/exdb/mnist)"
            " belong into the folder vision/mnist_t10k of OPTAX_MOMA_DATA."
        ) from error
    pooled = x.reshape(len(x), SIDE, 2, SIDE, 2).mean(axis=(2, 4)) / 255
    return Images(pooled.astype(np.float32), y.astype(np.int32))


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: 0, 0, type 8, the number of axes, sizes, values."""
    with gzip.open(path) as file:
        data = file.read()
    if data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is no IDX file of bytes: it begins with {data[:4].hex()}.")
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
