"""R and C: second moments kept as row and column sums."""

from typing import NamedTuple

import jax


class Factored(NamedTuple):
    """A rank-one estimate of a leaf's second moment: ``row * col``, broadcast to its shape.

    Both factors carry all the leaf's axes, with size one where they do not vary: a matrix of shape
    (m, n) has ``row`` (m, 1) and ``col`` (1, n); a stack of matrices (L, m, n) has (L, m, 1) and
    (L, 1, n). Powers stay factored: ``v**p = row**p * col**p``.
    """

    row: jax.Array
    col: jax.Array
