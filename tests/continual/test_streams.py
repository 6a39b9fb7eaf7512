import numpy as np
import pytest

from experiments.continual import streams
from experiments.noise.images import Images


def test_classes_come_two_at_a_time_and_nothing_is_in_two_splits(stream):
    for order in stream.orders:
        assert len(order) == 5
        seen = [c for name in order for c in map(int, name.split("+"))]
        assert sorted(seen) == list(range(10))
        for name in order:
            for split, size in zip(("train", "dev", "test"), (100, 20, 20), strict=True):
                images = stream.tasks[name][split]
                assert len(images.y) == size
                assert {*images.y.tolist()} == {*map(int, name.split("+"))}
    assert len({order for order in stream.orders}) == 3


def test_orders_end_differently():
    found = streams.orders("abcd")
    assert len({order[-1] for order in found}) == 3
    assert all(sorted(order) == list("abcd") for order in found)
    assert sorted(streams.orders("ab")) == [("a", "b"), ("b", "a")]


def test_changes_of_domain():
    x = np.random.default_rng(0).random((3, 14, 14))
    images = Images(x.astype(np.float32), np.arange(3))
    np.testing.assert_allclose(streams.changed("negative", images).x, 1 - images.x)
    np.testing.assert_array_equal(streams.changed("turned", images).x[0, 0], images.x[0, :, -1])
    noisy = streams.changed("noisy", images).x
    assert noisy.min() >= 0 and noisy.max() <= 1 and not np.array_equal(noisy, images.x)


def test_too_few_images_are_told():
    images = Images(np.zeros((30, 14, 14), np.float32), np.arange(30) % 10)
    with pytest.raises(ValueError, match="30 images are not 40"):
        streams.cut(images, (20, 10, 10), 0)
    with pytest.raises(ValueError, match="have 6 images, 10 are wanted"):
        streams._first(images, (1, 2), 10)
    parts = streams.cut(Images(images.x, np.arange(30)), (20, 5, 5), 0)
    assert sorted(y for part in parts.values() for y in part.y.tolist()) == list(range(30))
