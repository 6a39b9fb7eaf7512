"""Curves and planes drawn into Matplotlib axes that the caller owns; nothing is imported for it."""

from typing import Any

import jax
import numpy as np

from ._landscape import Curve, Plane


def draw_curve(axes: Any, curve: Curve, label: str | None = None) -> Any:
    """Draw values between two models, and the straight line that a barrier is measured from.

    Args:
      axes: Matplotlib axes.
      curve: A :class:`Curve` whose values are one array.
      label: What the legend calls it.

    Returns:
      The curve's ``Line2D``.

    Raises:
      TypeError: The values are a tree: take one of its arrays.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> from optax_moma.diagnostics import Curve, draw_curve
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> curve = Curve(jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 4.0, 2.0]))
      >>> draw_curve(axes, curve, "loss").get_ydata().tolist()
      [1.0, 4.0, 2.0]
    """
    values = _one_array(curve.values)
    (line,) = axes.plot(np.asarray(curve.alphas), values, marker="o", label=label)
    axes.plot([0, 1], [values[0], values[-1]], linestyle=":", color=line.get_color())
    axes.set_xlabel("share of the second model")
    return line


def draw_plane(axes: Any, plane: Plane) -> Any:
    """Draw values over two task vectors as filled contours, the three models marked.

    Args:
      axes: Matplotlib axes.
      plane: A :class:`Plane` whose values are one array.

    Returns:
      The contours; ``figure.colorbar`` takes them.

    Raises:
      TypeError: The values are a tree: take one of its arrays.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> from optax_moma.diagnostics import Plane, draw_plane
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> contours = draw_plane(axes, Plane(jnp.array([0.0, 1.0]), jnp.array([[0.0, 1], [2, 3]])))
      >>> axes.get_xlabel()
      'multiple of the first task vector'
    """
    scales = np.asarray(plane.scales)
    contours = axes.contourf(scales, scales, _one_array(plane.values).T)
    for name, x, y in (("base", 0, 0), ("first", 1, 0), ("second", 0, 1)):
        axes.plot([x], [y], marker="x", color="black")
        axes.annotate(name, (x, y))
    axes.set_xlabel("multiple of the first task vector")
    axes.set_ylabel("multiple of the second")
    return contours


def _one_array(values: Any) -> np.ndarray:
    if not isinstance(values, jax.Array | np.ndarray):
        raise TypeError(
            f"values are a {type(values).__name__}, and one array is drawn at a time:"
            " curve._replace(values=curve.values['loss']), for instance."
        )
    return np.asarray(values)
