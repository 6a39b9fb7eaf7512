"""Names of leaves, boxes, and the tables of a state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_moma import _tree


class Layer(NamedTuple):
    kernel: Any
    bias: Any


class Matrix(NamedTuple):
    U: Any
    s: Any


class Dense(NamedTuple):
    mu: Any


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"b": 1, "a": {"kernel": 2}}, ["a/kernel", "b"]),
        ([1, (2, {"x": 3})], ["0", "1/0", "1/1/x"]),
        ({"layer": Layer(1, 2)}, ["layer/kernel", "layer/bias"]),
        (1.0, [""]),
        ({}, []),
    ],
)
def test_names_follow_the_leaves(tree, names):
    found, leaves = _tree.named_leaves(tree)
    assert found == names
    assert leaves == jax.tree.leaves(tree)


def test_the_hash_of_a_name_is_the_same_everywhere():
    """The check value of CRC-32, published with the algorithm: a restart draws the same start."""
    assert _tree.name_hash("123456789") == 0xCBF43926
    assert _tree.name_hash("") == 0


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.complex64, jnp.complex64),
    ],
)
def test_at_least_float32(dtype, wide):
    assert _tree.at_least_float32(dtype) == wide


def test_float64_is_kept():
    with jax.enable_x64(True):
        assert _tree.at_least_float32(jnp.float64) == jnp.float64


def test_trees_and_back():
    params = {"w": jnp.ones((2, 3)), "frozen": None, "b": [jnp.ones(3)]}
    entries = [Dense(1), None, Matrix(2, 3)]  # in the order of the keys: b, frozen, w
    trees = _tree.to_trees(params, entries, ("U", "s", "mu"))
    nothing = optax.MaskedNode()
    assert trees == {
        "U": {"b": [nothing], "frozen": nothing, "w": 2},
        "s": {"b": [nothing], "frozen": nothing, "w": 3},
        "mu": {"b": [1], "frozen": nothing, "w": nothing},
    }

    class State(NamedTuple):
        U: Any
        s: Any
        mu: Any

    forms = (Matrix, Dense)
    back = _tree.to_entries(params, State(**trees), forms)
    assert back == [Dense(1), Dense(nothing), Matrix(2, 3)]
    assert list(map(type, back)) == [Dense, Dense, Matrix]
    # A leaf without a gradient still has its entry.
    assert _tree.to_entries(params | {"w": None}, State(**trees), forms)[2] == Matrix(2, 3)


def test_boxes_are_opened():
    nnx = pytest.importorskip("flax.nnx")
    linen = pytest.importorskip("flax.linen")
    x, y, z = np.ones(2), np.zeros(3), np.arange(4)
    tree = {
        "nnx": nnx.Param(jnp.asarray(x)),
        "linen": linen.Partitioned(jnp.asarray(y), names=("fsdp",)),
        "plain": jnp.asarray(z),
    }
    plain = _tree.unboxed(tree)
    assert {type(leaf) for leaf in plain.values()} == {type(tree["plain"])}
    for name, expected in (("nnx", x), ("linen", y), ("plain", z)):
        np.testing.assert_array_equal(plain[name], expected)
