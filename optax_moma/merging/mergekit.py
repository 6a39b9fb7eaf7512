"""Methods as mergekit has them, where they differ from ours.

In all of them a tied vote goes to the positive sign, and what a random mask leaves is rescaled to
the L1 norm that the task vector had. mergekit's ``lambda`` is our ``scale``, its ``gamma`` our
``top``, its ``epsilon`` our ``spread``; its weights are the ``weights`` of ``merge``. Its other
methods, and what they are here:

- ``linear``: ``average()``
- ``task_arithmetic``: ``task_arithmetic(scale=1.0)``
- ``breadcrumbs``: ``breadcrumbs(density, top, scale=1.0)``
- ``slerp``, ``nuslerp``: ``slerp()``, the second with a base for task vectors
- ``multislerp``: ``multislerp()``
- ``karcher``: ``karcher()`` with equal weights
- ``model_stock``: ``model_stock()``, which never lets the ratio fall below zero
There is nothing here like ``passthrough``, which stacks layers of several models and scales them
(a recipe's rule ``keep:`` takes leaves of one model as they are, in their own places), nor like
``nearswap``, ``arcee_fusion``, ``ram`` and ``ramplus_tl``.

``normalize`` of a method without an election divides by the sum of the weights: give weights that
add up to one. Weights below zero are refused where a sum is divided by them: mergekit lets them
cancel there, and adds what was to be subtracted. Where a trim cuts through entries of one
magnitude, mergekit keeps some of them, ours all. With bfloat16 inputs mergekit computes in
bfloat16 unless told otherwise; ours computes in float32.

Source: mergekit 0.1.5, which the tests compare with.
"""

from optax_moma.merging import _contract, _masks, _steps


def _merged(
    sparsify: _contract.Step,
    scale: _steps.Number,
    *,
    rescale: bool,
    elect: bool = True,
    normalize: bool = False,
) -> _steps.Chain:
    return _steps.chain(
        sparsify,
        *([_masks.match_norm()] if rescale else []),
        *([_steps.elect(tied="positive")] if elect else []),
        _steps.mean() if normalize else _steps.total(),
        _steps.scale(scale),
    )


def ties(
    density: _steps.Number = 1.0,
    scale: _steps.Number = 1.0,
    *,
    normalize: bool = True,
    rescale: bool = False,
) -> _steps.Chain:
    """TIES; a tied vote goes to the positive sign.

    m_t = [|d_t| >= its k-th largest, k = density * n], per leaf;
    sign = sign(sum_t w_t m_t d_t), or +1 if that is 0; a_t = m_t [sign(w_t d_t) == sign];
    merged = base + scale * sum_t w_t a_t d_t / sum_t w_t a_t, or without the divisor.

    Needs a base; takes any number of experts.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      scale: The factor of the merged task vector.
      normalize: Whether to divide by the weights that agree; they must then not be negative.
      rescale: Whether to give the trimmed task vectors the L1 norm they had.

    Returns:
      A method for ``merge``: ``chain(trim(density), elect(tied="positive"), mean(), scale(scale))``
      with ``match_norm()`` after the trim to rescale, and ``total()`` if not normalised.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, mergekit
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., -1.])}]
      >>> merge(mergekit.ties(), experts, base={"w": jnp.zeros(2)})
      {'w': Array([2., 1.], dtype=float32)}

    Source: mergekit's ``ties``, after Yadav et al. 2023 (arXiv 2306.01708).
    """
    return _merged(_steps.trim(density), scale, rescale=rescale, normalize=normalize)


def breadcrumbs_ties(
    density: _steps.Number = 0.9, top: _steps.Number = 0.01, scale: _steps.Number = 1.0
) -> _steps.Chain:
    """Breadcrumbs with an election.

    merged = base + scale * sum_t w_t a_t d_t, a_t the masks m_t of ``band`` where
    sign(w_t d_t) = sign(sum_t w_t m_t d_t), or +1 if that is 0.

    Needs a base; takes any number of experts.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      top: Share of the largest entries dropped.
      scale: The factor of the sum.

    Returns:
      A method for ``merge``:
      ``chain(band(density, top), elect(tied="positive"), total(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, mergekit
      >>> experts, base = [{"w": jnp.array([9., 1., 2., 3.])}], {"w": jnp.zeros(4)}
      >>> merge(mergekit.breadcrumbs_ties(density=0.5, top=0.25), experts, base=base)
      {'w': Array([0., 0., 2., 3.], dtype=float32)}

    Source: mergekit's ``breadcrumbs_ties``, after Davari and Belilovsky 2024 (arXiv 2312.06795).
    """
    return _merged(_masks.band(density, top), scale, rescale=False)


def dare_linear(
    density: _steps.Number = 1.0, scale: _steps.Number = 1.0, *, rescale: bool = True
) -> _steps.Chain:
    """DARE, rescaled to the L1 norm.

    merged = base + scale * sum_t w_t c_t m_t d_t, m_t ~ Bernoulli(density),
    c_t = sum|d_t| / sum|m_t d_t| over the leaf.

    Needs a base and a key; takes any number of experts.

    Args:
      density: Share of entries kept on average, from 0 to 1.
      scale: The factor of the sum.
      rescale: Whether to rescale; without, c_t = 1.

    Returns:
      A method for ``merge``:
      ``chain(drop(density, rescale=False), match_norm(), total(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, mergekit
      >>> experts, base = [{"w": jnp.ones(4)}], {"w": jnp.zeros(4)}
      >>> merged = merge(mergekit.dare_linear(0.5), experts, base=base, key=jax.random.key(0))
      >>> float(merged["w"].sum())
      4.0

    Source: mergekit's ``dare_linear``, after Yu et al. 2024 (arXiv 2311.03099).
    """
    return _merged(_steps.drop(density, rescale=False), scale, rescale=rescale, elect=False)


def dare_ties(
    density: _steps.Number = 1.0,
    scale: _steps.Number = 1.0,
    *,
    normalize: bool = False,
    rescale: bool = True,
) -> _steps.Chain:
    """DARE, rescaled to the L1 norm, with the election of ``ties``.

    With c_t and m_t as in ``dare_linear`` and e_t = c_t m_t d_t:
    sign = sign(sum_t w_t e_t), or +1 if that is 0; a_t = [sign(w_t e_t) == sign];
    merged = base + scale * sum_t w_t a_t e_t, or that over sum_t w_t a_t.

    Needs a base and a key; takes any number of experts.

    Args:
      density: Share of entries kept on average, from 0 to 1.
      scale: The factor of the sum.
      normalize: Whether to divide by the weights that agree; they must then not be negative.
      rescale: Whether to rescale; without, c_t = 1.

    Returns:
      A method for ``merge``: ``chain(drop(density, rescale=False), match_norm(),
      elect(tied="positive"), total(), scale(scale))``, with ``mean()`` if normalised.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, mergekit
      >>> experts, base = [{"w": jnp.array([1., -2.])}, {"w": jnp.ones(2)}], {"w": jnp.zeros(2)}
      >>> merge(mergekit.dare_ties(1.0), experts, base=base, key=jax.random.key(0))
      {'w': Array([ 2., -2.], dtype=float32)}

    Source: mergekit's ``dare_ties``, after Yu et al. 2024 (arXiv 2311.03099).
    """
    return _merged(_steps.drop(density, rescale=False), scale, rescale=rescale, normalize=normalize)


def della_linear(
    density: _steps.Number = 0.5,
    spread: _steps.Number = 0.15,
    scale: _steps.Number = 1.0,
    *,
    rescale: bool = True,
    axes: str = "mn",
) -> _steps.Chain:
    """DELLA's masks, rescaled to the L1 norm, and a sum.

    merged = base + scale * sum_t w_t c_t m_t d_t, m_t as in ``drop_by_magnitude``,
    c_t = sum|d_t| / sum|m_t d_t| over the leaf.

    Needs a base and a key; takes any number of experts.

    Args:
      density: Share of entries kept on average, from 0 to 1.
      spread: How much more than the average the largest entries are kept, and the smallest less.
      scale: The factor of the sum.
      rescale: Whether to rescale; without, c_t = 1.
      axes: Which leaves are matrices, as in ``tsv_m``; mergekit ranks along the last axis of all.

    Returns:
      A method for ``merge``: ``chain(drop_by_magnitude(density, spread, rescale=False, axes=axes),
      match_norm(), total(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, mergekit
      >>> experts, base = [{"w": jnp.array([1., 2.])}], {"w": jnp.zeros(2)}
      >>> merge(mergekit.della_linear(0.5, 0.5), experts, base=base, key=jax.random.key(0))
      {'w': Array([0., 3.], dtype=float32)}

    Source: mergekit's ``della_linear``, after Deep et al. 2024 (arXiv 2406.11617).
    """
    sparsify = _masks.drop_by_magnitude(density, spread, rescale=False, axes=axes)
    return _merged(sparsify, scale, rescale=rescale, elect=False)


def della(
    density: _steps.Number = 0.5,
    spread: _steps.Number = 0.15,
    scale: _steps.Number = 1.0,
    *,
    normalize: bool = True,
    rescale: bool = True,
    axes: str = "mn",
) -> _steps.Chain:
    """DELLA's masks, rescaled to the L1 norm, with the election of ``ties``.

    With e_t = c_t m_t d_t as in ``della_linear``: sign = sign(sum_t w_t e_t), or +1 if that is 0;
    a_t = [sign(w_t e_t) == sign]; merged = base + scale * sum_t w_t a_t e_t / sum_t w_t a_t, or
    without the divisor.

    Needs a base and a key; takes any number of experts.

    Args:
      density: Share of entries kept on average, from 0 to 1.
      spread: How much more than the average the largest entries are kept, and the smallest less.
      scale: The factor of the merged task vector.
      normalize: Whether to divide by the weights that agree; they must then not be negative.
      rescale: Whether to rescale; without, c_t = 1.
      axes: Which leaves are matrices, as in ``tsv_m``; mergekit ranks along the last axis of all.

    Returns:
      A method for ``merge``: ``chain(drop_by_magnitude(density, spread, rescale=False, axes=axes),
      match_norm(), elect(tied="positive"), mean(), scale(scale))``, with ``total()`` if not
      normalised.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, mergekit
      >>> experts, base = [{"w": jnp.array([1., 2.])}], {"w": jnp.zeros(2)}
      >>> merge(mergekit.della(0.5, 0.5), experts, base=base, key=jax.random.key(0))
      {'w': Array([0., 3.], dtype=float32)}

    Source: mergekit's ``della``, after Deep et al. 2024 (arXiv 2406.11617).
    """
    sparsify = _masks.drop_by_magnitude(density, spread, rescale=False, axes=axes)
    return _merged(sparsify, scale, rescale=rescale, normalize=normalize)


def sce(density: _steps.Number = 1.0) -> _steps.Chain:
    """SCE; a tied vote goes to the positive sign.

    As ``optax_moma.merging.sce``, with sign = +1 where sum_t e_t = 0.

    Needs a base; takes any number of experts. mergekit takes the density as a share of the entries
    in which the experts differ at all, ours of all entries.

    Args:
      density: Share of entries kept, from 0 to 1: mergekit's ``select_topk``.

    Returns:
      A method for ``merge``: ``chain(select(density), elect(tied="positive"), energy(), mean())``.

    Raises:
      ValueError: if the density is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, mergekit
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., -1.])}]
      >>> merge(mergekit.sce(), experts, base={"w": jnp.zeros(2)})["w"].round(4)
      Array([2.6667, 1.    ], dtype=float32)

    Source: mergekit's ``sce``, after Wan et al. 2024 (arXiv 2408.07990).
    """
    return _steps.chain(
        _masks.select(density), _steps.elect(tied="positive"), _masks.energy(), _steps.mean()
    )
