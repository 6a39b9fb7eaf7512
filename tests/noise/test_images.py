import gzip

import numpy as np
import pytest

from experiments.noise import images


def write_idx(path, array):
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(b"\0\0\x08" + bytes([array.ndim]) + shape + array.tobytes()))


def pair(folder, name, count):
    rng = np.random.default_rng(count)
    x = rng.integers(0, 256, (count, 28, 28), np.uint8)
    y = (np.arange(count) % 10).astype(np.uint8)
    write_idx(folder / f"{name}-images-idx3-ubyte.gz", x)
    write_idx(folder / f"{name}-labels-idx1-ubyte.gz", y)
    return x, y


def test_fashion_is_cut_and_pooled(tmp_path, monkeypatch):
    folder = tmp_path / images.PLACES[0]
    folder.mkdir(parents=True)
    x, y = pair(folder, "train", 30)
    pair(folder, "t10k", 20)
    monkeypatch.setenv("OPTAX_MOMA_DATA", str(tmp_path))
    split = images.fashion(train=12, dev=5)
    assert [len(part.y) for part in split] == [12, 5, 20]
    np.testing.assert_array_equal(split.dev.y, y[-5:])
    want = x[3, 4:6, 10:12].astype(float).mean() / 255
    np.testing.assert_allclose(split.train.x[3, 2, 5], want, rtol=1e-6)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTAX_MOMA_DATA", str(tmp_path))
    monkeypatch.setattr(images, "PLACES", images.PLACES[:1])
    with pytest.raises(images.DataError, match="apt-get install dataset-fashion-mnist"):
        images.fashion()
    with pytest.raises(images.DataError, match=r"t10k-images.*is missing.*vision/mnist_t10k"):
        images.mnist()
    (tmp_path / "no.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(images.DataError, match="no IDX file of bytes: it begins with 74657874"):
        images.read_idx(tmp_path / "no.gz")


def test_digits_are_enlarged():
    datasets = pytest.importorskip("sklearn.datasets")
    found = images.digits()
    small = datasets.load_digits().images / 16
    assert found.x.shape == (1797, images.SIDE, images.SIDE)
    # Corners stay where they are; between two pixels values lie on a line.
    np.testing.assert_allclose(found.x[:, 0, -1], small[:, 0, 7], atol=1e-6)
    np.testing.assert_allclose(found.x[:, -1, 0], small[:, 7, 0], atol=1e-6)
    at = 5 * 7 / 13
    want = small[:, 0, 2] * (3 - at) + small[:, 0, 3] * (at - 2)
    np.testing.assert_allclose(found.x[:, 0, 5], want, atol=1e-6)
