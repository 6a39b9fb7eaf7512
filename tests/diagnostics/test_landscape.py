"""Curves, barriers and planes of functions whose values are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma.diagnostics import (
    Curve,
    Plane,
    barrier,
    draw_curve,
    draw_plane,
    interpolation_curve,
    midpoint_gain,
    task_arithmetic_plane,
)

A = {"w": jnp.array([1.0, -2.0]), "steps": jnp.array(3)}
B = {"w": jnp.array([3.0, 2.0]), "steps": jnp.array(3)}


def test_values_on_the_line():
    measure = jax.jit(lambda p: {"sum": p["w"].sum(), "steps": p["steps"]})
    curve = interpolation_curve(A, B, measure, 5)
    np.testing.assert_allclose(curve.alphas, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.values["sum"], -1 + 6 * np.linspace(0, 1, 5), rtol=1e-6)
    np.testing.assert_array_equal(curve.values["steps"], [3] * 5)


def test_ends_are_the_models_themselves():
    models = [
        {"w": jnp.asarray(np.random.default_rng(i).normal(size=9), jnp.bfloat16)} for i in (0, 1)
    ]
    ends = interpolation_curve(*models, lambda p: p["w"][4], [0.0, 1.0]).values
    assert ends.tolist() == [m["w"][4].item() for m in models]


@pytest.mark.parametrize("alphas", [0, [], [-0.1, 1.0], [0.0, 1.1], [[0.0, 1.0]], [float("nan")]])
def test_alphas_off_the_line(alphas):
    with pytest.raises(ValueError, match="alphas must be at least one number"):
        interpolation_curve(A, B, lambda p: p["w"].sum(), alphas)


def test_models_that_do_not_fit():
    measure = lambda p: p["w"].sum()
    with pytest.raises(ValueError, match=r"w: shape \(3,\)"):
        interpolation_curve(A, A | {"w": jnp.ones(3)}, measure)
    with pytest.raises(ValueError, match="not finite"):
        interpolation_curve(A, A | {"w": jnp.array([1.0, jnp.nan])}, measure)
    with pytest.raises(ValueError, match=r"steps: 1 values .* differ"):
        interpolation_curve(A, A | {"steps": jnp.array(4)}, measure)


def test_barrier_above_a_sloping_line():
    alphas = np.linspace(0, 1, 21)
    bump = 0.7 * np.exp(-((alphas - 0.4) ** 2) / 0.001)
    assert barrier(alphas, 2 - alphas + bump) == pytest.approx(0.7, rel=1e-5)
    assert barrier(alphas, 2 - alphas - bump) == pytest.approx(0, abs=1e-6)


def test_midpoint_gain():
    alphas = np.linspace(0, 1, 11)
    assert midpoint_gain(alphas, alphas * (1 - alphas) + alphas) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no 1/2"):
        midpoint_gain(np.linspace(0, 1, 4), np.ones(4))


@pytest.mark.parametrize("function", [barrier, midpoint_gain])
def test_curves_that_are_none(function):
    with pytest.raises(ValueError, match="ascend from 0 to 1"):
        function([0.0, 0.5], [1.0, 1.0])
    with pytest.raises(ValueError, match="ascend from 0 to 1"):
        function([0.0, 0.7, 0.5, 1.0], [1.0] * 4)
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        function([0.0, 1.0], [1.0] * 3)


def test_plane():
    base = {"w": jnp.array([1.0, 1.0])}
    a, b = {"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([1.0, 4.0])}
    scales = [-1.0, 0.0, 0.5]
    plane = task_arithmetic_plane(base, a, b, lambda p: {"x": p["w"][0], "y": p["w"][1]}, scales)
    np.testing.assert_allclose(plane.values["x"], np.repeat([[0.0], [1.0], [1.5]], 3, axis=1))
    np.testing.assert_allclose(plane.values["y"], np.repeat([[-2.0, 1.0, 2.5]], 3, axis=0))
    with pytest.raises(ValueError, match="scales must be"):
        task_arithmetic_plane(base, a, b, lambda p: p["w"].sum(), [])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        task_arithmetic_plane(base, a, {"w": jnp.ones(3)}, lambda p: p["w"].sum())


def test_figures():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    left, right = figure.subplots(1, 2)
    values = jnp.array([1.0, 4.0, 2.0])
    line = draw_curve(left, Curve(jnp.array([0.0, 0.5, 1.0]), values), "loss")
    np.testing.assert_array_equal(line.get_ydata(), values)
    np.testing.assert_array_equal(left.lines[1].get_ydata(), [1, 2])
    plane = Plane(jnp.array([0.0, 1.0]), jnp.array([[0.0, 1.0], [10.0, 11.0]]))
    contours = draw_plane(right, plane)
    np.testing.assert_array_equal(contours.zmax, 11)
    figure.colorbar(contours)
    figure.draw_without_rendering()
    with pytest.raises(TypeError, match="values are a dict"):
        draw_curve(left, Curve(jnp.zeros(2), {"loss": jnp.zeros(2)}))
