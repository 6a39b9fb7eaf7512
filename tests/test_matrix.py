"""Leaves seen as matrices, against NumPy's moveaxis and reshape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers as Axes

from optax_moma import _matrix


def leaf(*shape: int) -> jax.Array:
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


def layout_of(x, dimension_numbers=None, min_dim_size_to_factor=1):
    (layout,) = _matrix.layouts(x, dimension_numbers, min_dim_size_to_factor)
    return layout


# shape, dimension numbers, smallest size, and what NumPy makes of it: the order of the axes, and
# the shape of the matrices.
VIEWS = [
    ((3, 4), None, 1, (0, 1), (3, 4)),
    ((3, 4), Axes(0, 1), 1, (0, 1), (3, 4)),
    ((3, 4), Axes(1, 0), 1, (1, 0), (4, 3)),
    ((3, 4), Axes(-1, -2), 1, (1, 0), (4, 3)),
    ((2, 3, 4), None, 1, (0, 1, 2), (2, 3, 4)),  # a stack of layers
    ((8, 2, 4), None, 8, (0, 1, 2), (8, 8)),  # (d, heads, hd)
    ((2, 4, 8), None, 8, (0, 1, 2), (8, 8)),  # (heads, hd, d)
    ((3, 3, 4, 32), None, 8, (0, 1, 2, 3), (3, 12, 32)),  # a convolution's kernel
    ((5, 8, 2, 4), None, 8, (0, 1, 2, 3), (5, 8, 8)),  # layers of (d, heads, hd)
    ((5, 2, 4, 8), None, 8, (0, 1, 2, 3), (5, 8, 8)),  # layers of (heads, hd, d)
    ((5, 2, 8, 9), None, 8, (0, 1, 2, 3), (5, 2, 8, 9)),  # layers of experts
    ((2, 2, 2, 4), None, 4, (0, 1, 2, 3), (2, 4, 4)),
    ((2, 2, 2, 2), None, 4, (0, 1, 2, 3), (4, 4)),  # a stack of two would be too small
    ((3, 3, 4, 9), Axes((0, 1, 2), 3), 1, (0, 1, 2, 3), (36, 9)),
    ((5, 2, 4), Axes(0, (1, 2)), 1, (0, 1, 2), (5, 8)),
    ((5, 2, 4), Axes(0, (2, 1)), 1, (0, 2, 1), (5, 8)),
    ((5, 2, 4), Axes(0, 2), 1, (1, 0, 2), (2, 5, 4)),  # axis 1 stacks
    ((5, 2, 4, 3), Axes((3, 0), 2), 1, (1, 3, 0, 2), (2, 15, 4)),
]


@pytest.mark.parametrize(("shape", "numbers", "smallest", "order", "matrix"), VIEWS)
def test_to_matrix_and_back(shape, numbers, smallest, order, matrix):
    x = leaf(*shape)
    layout = layout_of(x, numbers, smallest)
    assert layout.matrix_shape == matrix
    expected = np.transpose(np.asarray(x), order).reshape(matrix)
    np.testing.assert_array_equal(layout.to_matrix(x), expected)
    np.testing.assert_array_equal(layout.from_matrix(layout.to_matrix(x), x), x)


# The table in the docstring of scale_by_moma: a leaf, its view without numbers, and with them.
D, L, M, N = 1024, 24, 256, 512
TABLE = [
    ((M, N), (M, N), Axes(0, 1), (M, N)),
    ((L, M, N), (L, M, N), Axes(1, 2), (L, M, N)),
    ((D, 12, 64), (D, 768), Axes(0, (1, 2)), (D, 768)),
    ((L, D, 12, 64), (L, D, 768), Axes(1, (2, 3)), (L, D, 768)),
    ((D, 128, 128), (D, 128, 128), Axes(0, (1, 2)), (D, 128 * 128)),
    ((12, 64, D), (768, D), Axes((0, 1), 2), (768, D)),
    ((16, 128, D), (16, 128, D), Axes((0, 1), 2), (16 * 128, D)),
    ((L, 12, 64, D), (L, 768, D), Axes((1, 2), 3), (L, 768, D)),
    ((L, 8, M, N), (L, 8, M, N), Axes(2, 3), (L, 8, M, N)),
    ((3, 3, M, N), (3, 3, M, N), Axes((0, 1, 2), 3), (9 * M, N)),
]


@pytest.mark.parametrize(("shape", "by_rule", "numbers", "named"), TABLE)
def test_views_of_the_leaves_of_models(shape, by_rule, numbers, named):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert layout_of(x, None, 128).matrix_shape == by_rule
    assert layout_of(x, numbers, 128).matrix_shape == named
    # Whatever the smallest size was, curvature_from finds the view among these.
    views = [layout.matrix_shape for layout in _matrix.default_layouts(x)]
    assert by_rule in views and len({len(view) for view in views}) == len(views)


@pytest.mark.parametrize(("shape", "numbers", "smallest", "order", "matrix"), VIEWS)
def test_rows_and_columns_broadcast_against_the_leaf(shape, numbers, smallest, order, matrix):
    layout = layout_of(leaf(*shape), numbers, smallest)
    rows, cols = leaf(*matrix[:-1]), leaf(*matrix[:-2], matrix[-1]) + 1
    outer = rows[..., :, None] * cols[..., None, :]
    product = layout.rows_in_leaf(rows) * layout.cols_in_leaf(cols)
    np.testing.assert_array_equal(product, layout.from_matrix(outer, leaf(*shape)))
    assert layout.rows_in_leaf(rows).size == rows.size


@pytest.mark.parametrize(
    ("shape", "smallest"), [((), 1), ((9,), 1), ((4, 9), 5), ((0, 9), 1), ((2, 2, 2), 5)]
)
def test_leaves_that_are_kept_dense(shape, smallest):
    assert layout_of(jnp.zeros(shape), None, smallest) is None


def test_complex_matrices_are_kept_dense():
    assert layout_of(jnp.zeros((4, 4), jnp.complex64)) is None


def test_published_view():
    assert _matrix.paper_layout(leaf(4, 3, 5)).matrix_shape == (4, 15)
    assert _matrix.paper_layout(leaf(4, 3)).matrix_shape == (4, 3)
    assert _matrix.paper_layout(leaf(4)) is None and _matrix.paper_layout(leaf()) is None


def test_dimension_numbers_as_tree_prefix_and_callable():
    params = {"attention": {"k": leaf(6, 4), "q": leaf(6, 4)}, "bias": leaf(4), "w": leaf(3, 4)}
    tree = {"attention": {"k": Axes(1, 0), "q": Axes(1, 0)}, "bias": None, "w": Axes(0, 1)}
    prefix = {"attention": Axes(1, 0), "bias": None, "w": Axes(0, 1)}
    shapes = [(4, 6), (4, 6), None, (3, 4)]
    for numbers in (tree, prefix, lambda params: tree, lambda params: prefix):
        found = _matrix.layouts(params, numbers, 1)
        assert [layout and layout.matrix_shape for layout in found] == shapes


@pytest.mark.parametrize(
    ("numbers", "error", "words"),
    [
        (Axes(0, 2), ValueError, "axis 2 of leaf 'w'"),
        (Axes(-3, 0), ValueError, "axis -3"),
        (Axes(0, 0), ValueError, "no axis twice"),
        (Axes(0, -2), ValueError, "no axis twice"),
        (Axes((), 1), ValueError, "at least one axis"),
        ("in out", TypeError, "'in out'"),
        ({"v": Axes(0, 1)}, ValueError, "tree like the parameters"),
        (lambda params: {"w": 3}, TypeError, "3"),
    ],
)
def test_dimension_numbers_that_do_not_fit(numbers, error, words):
    with pytest.raises(error, match="dimension_numbers") as raised:
        _matrix.layouts({"w": leaf(3, 4)}, numbers, 1)
    assert words in str(raised.value)


def test_an_error_of_dimension_numbers_names_the_leaf():
    params = {"block": {"attention": leaf(3, 4), "heads": leaf(3, 4, 5)}}
    with pytest.raises(ValueError, match="block/attention"):
        _matrix.layouts(params, Axes(0, 2), 1)


def test_a_tree_without_leaves_fits_any_numbers():
    for numbers in ({"w": Axes(0, 1)}, lambda params: params["w"]):
        assert _matrix.layouts({}, numbers, 1) == []


def test_one_spec_serves_a_whole_model():
    found = _matrix.layouts({"kernel": leaf(3, 4), "scale": leaf(4)}, Axes(0, 1), 1)
    assert found[0].matrix_shape == (3, 4) and found[1] is None


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_contract_is_einsum_in_full_precision(batch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(*batch, 5, 4)), rng.normal(size=(*batch, 5, 3))
    found = _matrix.contract("mr,ms->rs", jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(found, np.swapaxes(a, -1, -2) @ b, rtol=1e-5, atol=1e-5)


def test_contract_asks_for_the_highest_precision():
    x = jnp.ones((4, 4))
    text = jax.jit(lambda x: _matrix.contract("mr,ms->rs", x, x)).lower(x).as_text()
    assert "HIGHEST" in text
