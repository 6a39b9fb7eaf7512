r"""The optimizer: low-rank momentum of the preconditioned gradient.

For a matrix W (m, n) with gradient G, at step t, with ``ema_b = b * old + (1 - b) * new``,
``w1 = 1 - b1^t`` and ``w2 = 1 - b2^t``:

.. math::
    R &= ema_{b2}(G^2 1), \quad C = ema_{b2}(1^T G^2) \\
    \hat G &= G \odot P, \quad P = (R C^T / \textstyle\sum R / w_2)^{-1/2} \\
    Q &= orth\big((b_1 U s V^T + (1 - b_1) \hat G) V\big), \quad B = \hat G^T Q \\
    U s V^T &\leftarrow Q Q^T (b_1 U s V^T + (1 - b_1) \hat G) \\
    \Delta &= U (s / w_1) V^T + \tfrac 1 2 (\hat G - Q B^T) \\
    \Delta_k &\leftarrow \sqrt n \, (\Delta_k \Delta_k^T)^{-1/2} \Delta_k
    \quad \text{for each block k of at most 128 rows (of columns, transposed, if m > n)}

P is rank one, so preconditioning scales rows and columns of thin products. The momentum lives in
the preconditioned space: what its truncation drops is then what matters least for the step. What
falls outside the subspace is not remembered, but the current gradient's share of it is applied, by
half for it is noisier (``residual``): full-rank updates, at no state. In the end all directions of
a block move alike, as in Muon; else the few that all gradients of early training share would leave
the others next to nothing. Blocks make that cheap, and keep it within devices. Here n counts the
columns (rows, if m > n) that a gradient ever reached: those of an embedding that never occur lend
the others no length.

Without blocks (``orthogonal_block_size=None``) the last two lines are

.. math::
    \Delta &= U \min(s / w_1, \sqrt{\max(m, n)}) V^T + (\hat G - Q B^T) \\
    \Delta &\leftarrow \Delta / \max(1, RMS(\Delta)) ,

where no direction of the momentum moves further than it would in an orthogonal update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from . import _moments as moments
from ._checks import Scalar, check_decay, check_integer, check_not_negative, check_width
from ._lowrank import Factors, follow, transposed
from ._matrix import Layout, contract, divisor, layouts, reshard, unshared
from ._orthogonal import orthogonal_factor
from ._tree import (
    at_least_float32,
    is_none,
    name_hash,
    named_leaves,
    to_entries,
    to_trees,
    unboxed,
)


class ScaleByMomaState(NamedTuple):
    """State of :func:`scale_by_moma`: trees like the parameters, one per quantity.

    A leaf has its entry in the trees of its kind and an ``optax.MaskedNode`` in the others. For a
    matrix leaf (with stacked axes first, if it has any):

    Attributes:
      count: Number of updates so far, int32.
      mu_weight: Total weight of the momentum's moving average, 1 - b1^count.
      nu_weight: Total weight of the second moments' moving average, 1 - b2^count.
      U: Left factors of the momentum, (m, r): orthonormal columns, null ones beyond its rank.
      s: Lengths, (r,).
      V: Right factors, (n, r), unit columns.
      R: Moving average of the row sums of the squared gradient, (m,).
      C: Moving average of its column sums, (n,).
      saliency_row: Sums over rows of the loss decrease along the trajectory, (m,).
      saliency_col: The same over columns, (n,).
      mu: First moment of every other leaf.
      nu: Second moment of every other leaf.
      saliency: Loss decrease along the trajectory, entry by entry, of every other leaf.
    """

    count: Any
    mu_weight: jax.Array
    nu_weight: jax.Array
    U: Any
    s: Any
    V: Any
    R: Any
    C: Any
    saliency_row: Any
    saliency_col: Any
    mu: Any
    nu: Any
    saliency: Any


class _Matrix(NamedTuple):
    """What the state holds of one matrix leaf."""

    U: Any
    s: Any
    V: Any
    R: Any
    C: Any
    saliency_row: Any
    saliency_col: Any


class _Dense(NamedTuple):
    """What the state holds of one other leaf."""

    mu: Any
    nu: Any
    saliency: Any


_FIELDS = _Matrix._fields + _Dense._fields


class _Hyper(NamedTuple):
    """The numbers of one update."""

    b1: Scalar
    b2: Scalar
    eps: Scalar
    residual: Scalar
    clip_rms: Scalar
    orthogonal_block_size: int | None
    clip_spectral: Scalar
    learning_rate: Scalar
    mu_weight: jax.Array
    nu_weight: jax.Array


def scale_by_moma(
    rank: int = 32,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    eps: Scalar = 1e-8,
    residual: Scalar | None = None,
    clip_rms: Scalar = 1.0,
    orthogonal_block_size: int | None = 128,
    clip_spectral: Scalar | None = None,
    min_dim_size_to_factor: int = 128,
    weight_dimension_numbers: Any = None,
    saliency: bool = True,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates by low-rank momentum of the preconditioned gradient.

    The update is :math:`\Delta` of the equations of :func:`moma`, the optimizer made of it. State
    of a matrix (m, n): ``(rank + 2) (m + n) + rank`` numbers, with saliency. A leaf that is no
    matrix gets Adam's moments, the same relative ``eps`` and ``clip_rms``, taken over the whole
    leaf. A matrix of a stack (see ``weight_dimension_numbers``) is updated as if it were a leaf of
    its own.

    Derivatives through an update, as meta-learning takes them, are right in forward mode; in
    reverse mode they are NaN where a gradient has a lower rank than the momentum.

    A gradient that is not finite makes its whole leaf so, for good: the momentum mixes all entries.
    Where losses may overflow wrap the optimizer in ``optax.apply_if_finite``. A finite gradient
    whose square overflows (above 1e19 in float32) only stops what the square is counted in: its
    entry, or its row and its column.

    Args:
      rank: Columns of the momentum's factors, r >= 1 (at most min(m, n) are kept). In pretraining
        it counts little (``experiments/pretrain``), without blocks more.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moments R and C, in [0, 1).
      eps: The preconditioner counts no row, column or entry as less than this share of the average
        one. Relative: a loss multiplied by a constant gives the same updates; an entry that once
        had a gradient ``eps**-0.5`` times the others' holds them back while it is remembered.
      residual: Multiplies the part of the gradient outside the subspace, which is noisier than the
        momentum inside. None: 0.5 with blocks, 1 without. With blocks a half is better than the
        whole in pretraining, and 0, which leaves that part out, far behind
        (``experiments/pretrain``).
      clip_rms: Largest root mean square of a matrix's update, or of another leaf's, as in
        Adafactor; ``inf`` for none. An orthogonalized update of many directions has about 1, 0.6 to
        1.2, times ``clip_rms`` if that is less.
      orthogonal_block_size: Rows (or columns) of the shorter side that an orthogonalized block has
        at most; the side is cut into a power of two of them, as equal as can be. All directions of
        a block move alike, as in Muon, whose dense momentum is the low-rank one here; so a gradient
        of a single direction moves a block of b rows by an RMS of :math:`1 / \sqrt b` of the rate,
        where Adam moves it by 1: early training has such gradients, and toy problems. Rows of an
        embedding that never get a gradient do not count; those that get one now and then do, and
        lend their length to the rows of the step. Of a matrix that gets no gradients any more (an
        expert without tokens) updates keep their size for some thirty steps at ``b1 = 0.9``, as in
        Muon, and fade then. A block of b rows costs about
        :math:`4 b m n + 18 b^2 \min(m, n)` operations for the matrix, where a step of T tokens
        takes :math:`6 T m n`; what size is worth, ``experiments/pretrain`` says. On meshes the
        Grams of blocks whose rows lie within a device are added up, :math:`b \min(m, n)` numbers;
        other blocks are gathered on explicit meshes, and left to the compiler on others. None:
        updates are not orthogonalized, but clipped, by ``clip_spectral`` and ``clip_rms``: behind
        in pretraining, level in the fine-tuning that was tried (``experiments/glue``).
      clip_spectral: Without blocks, the largest length of one of the momentum's directions (they
        converge to singular values), in units of :math:`\sqrt{\max(m, n)}`; None for 1, ``inf`` for
        no limit.
      min_dim_size_to_factor: A matrix with fewer rows or columns is kept with Adam's dense moments,
        as are leaves that are no matrices, and complex ones.
      weight_dimension_numbers: Which axes of a leaf are fan-in and fan-out; the others stack
        independent matrices. None, for a rule that knows the shape only, below; one
        ``optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)``; a tree of them (a
        prefix will do, None for leaves that are no matrices); or a callable from parameters to such
        a tree.
      saliency: Whether to accumulate the loss decrease along the trajectory, the path integral
        :math:`\sum_t -g \odot \Delta w`, as row and column sums. It touches no step, and no
        function of this package reads it. It adds over a quarter to what a matrix's update reads
        and writes: ``cost_analysis()["bytes accessed"]`` of the compiled update of 768 x 3072 in
        float32 on a CPU is 18.2 times the matrix with it and 14.2 times without. To choose entries
        after training :func:`optax_moma.saliency`, from R and C, is the better score: in
        ``experiments/glue`` 5 % of the entries keep 7.7 ± 3.2 points more by it than by magnitude
        (three seeds), and 4.6 ± 2.4 points less by the integral (one seed). Without use for the
        integral switch it off.
      learning_rate: The rate (or schedule) by which the chain multiplies these updates later on. It
        weighs the steps in ``saliency`` and touches nothing else; 1, for want of it, weighs a
        constant rate's steps rightly up to that factor.
      mu_dtype: Type of U, s, V and mu: bfloat16, float32 or float64. None: the gradient's, but at
        least float32. (In float16 the mu of small gradients would be 0, and of large ones
        infinite.)
      nu_dtype: Type of R, C, nu and the saliency, float32 or float64: in half a type, a moving
        average with b2 = 0.999 stands still. None: the gradient's, but at least float32.
      seed: Seed of the random directions where the subspace starts to look.

    Without dimension numbers a leaf of two axes is a matrix as it stands, and a leaf of more axes
    the finest stack whose matrices reach ``min_dim_size_to_factor`` both ways: axes are taken off
    its front to stack, as many as can be, and the rest is cut in two where the halves are most
    nearly square. The rule cannot see what an axis means; ``state_size(tx, params).matrices`` says
    what it made of each leaf. With ``D = optax.contrib.MuonDimensionNumbers`` and sizes of at
    least 128 where they are not given:

    ===================================  ====================  ====================================
    leaf                                 without numbers       to say it
    ===================================  ====================  ====================================
    (m, n)                               (m, n)                ``D(0, 1)``
    scanned layers (L, m, n)             (L, m, n)             ``D(1, 2)``
    heads (d, 12, 64)                    (d, 768)              ``D(0, (1, 2))``
    scanned heads (L, d, 12, 64)         (L, d, 768)           ``D(1, (2, 3))``
    heads that are many (d, h, 128)      (d, h, 128): wrong    ``D(0, (1, 2))``
    output of heads (12, 64, d)          (768, d)              ``D((0, 1), 2)``
    output of heads (h, 128, d)          (h, 128, d): by head  ``D((0, 1), 2)``
    scanned output (L, 12, 64, d)        (L, 768, d)           ``D((1, 2), 3)``
    experts (L, E, m, n)                 (L, E, m, n)          ``D(2, 3)``
    convolution (3, 3, m, n)             (3, 3, m, n): by tap  ``D((0, 1, 2), 3)``
    ===================================  ====================  ====================================

    Returns:
      An ``optax.GradientTransformationExtraArgs``. It needs no params.

    Raises:
      ValueError: rank < 1, b1 or b2 outside [0, 1), a negative eps, residual, clip_rms or
        clip_spectral, a clip_spectral beside blocks, orthogonal_block_size < 1, dimension numbers
        that do not fit a leaf, a mu_dtype or nu_dtype that is none of these.
      TypeError: rank, min_dim_size_to_factor or orthogonal_block_size is not a Python integer. They
        fix shapes: under ``optax.inject_hyperparams`` name them in ``static_args``. Or b1, b2 or
        eps is an array of a type narrower than float32, in which 0.999 is 1 and nothing trains:
        inject_hyperparams makes them of the gradients' type unless it is given
        ``hyperparam_dtype=jnp.float32``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_moma as om
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> tx = optax.chain(om.scale_by_moma(rank=8), optax.scale(-1e-3))
      >>> state = tx.init(params)
      >>> state[0].U["kernel"].shape, state[0].R["kernel"].shape, state[0].mu["bias"].shape
      ((256, 8), (256,), (512,))

    Source: momentum in a warm-started subspace after Ahn et al., "Dion: Distributed Orthonormalized
    Updates", 2025; R, C and the clipping by RMS after Shazeer and Stern, "Adafactor", 2018; the
    gradient outside the subspace after Chen et al., "Fira", 2024; orthogonal updates after Jordan
    et al., "Muon", 2024, their blocks after Khaled et al., "MuonBP", 2025; the spectral clipping,
    free where the factors are at hand, after Jiang et al., "Enhancing LLM Training via Spectral
    Clipping", 2026; the path integral after Zenke et al., "Continual Learning Through Synaptic
    Intelligence", 2017.
    """
    rank = check_integer("rank", rank, lowest=1)
    min_dim_size_to_factor = check_integer(
        "min_dim_size_to_factor", min_dim_size_to_factor, lowest=1
    )
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_width("eps", eps)
    check_not_negative("eps", eps)
    if residual is None:
        residual = 1.0 if orthogonal_block_size is None else 0.5
    check_not_negative("residual", residual)
    check_not_negative("clip_rms", clip_rms)
    if orthogonal_block_size is not None:
        orthogonal_block_size = check_integer(
            "orthogonal_block_size", orthogonal_block_size, lowest=1
        )
    if clip_spectral is None:
        clip_spectral = 1.0
    elif orthogonal_block_size is not None:
        raise ValueError(
            "clip_spectral limits updates that are not orthogonalized: give"
            " orthogonal_block_size=None with it, or leave it out."
        )
    check_not_negative("clip_spectral", clip_spectral)
    _check_dtype("mu_dtype", mu_dtype, jnp.float64, jnp.float32, jnp.bfloat16)
    _check_dtype("nu_dtype", nu_dtype, jnp.float64, jnp.float32)

    def init_leaf(name: str, leaf: Any, layout: Layout | None) -> _Matrix | _Dense | None:
        if leaf is None:
            return None
        wide = at_least_float32(leaf.dtype)
        real = jnp.finfo(wide).dtype
        if layout is None:
            # A complex leaf keeps its phase whatever mu_dtype says.
            kind = wide if mu_dtype is None or wide != real else mu_dtype
            mu = jnp.zeros_like(leaf, dtype=kind)
            nu = jnp.zeros_like(leaf, dtype=nu_dtype or real)
            return _Dense(mu, nu, jnp.zeros_like(nu) if saliency else optax.MaskedNode())
        *batch, m, n = layout.matrix_shape
        r = min(rank, m, n)
        row, col = layout.row_sharding(leaf, minor=False), layout.col_sharding(leaf, minor=False)
        R, C = (
            jnp.zeros((*batch, size), nu_dtype or wide, out_sharding=sharding)
            for size, sharding in ((m, row), (n, col))
        )
        key = jax.random.fold_in(jax.random.key(seed), name_hash(name))
        V = jax.random.normal(key, (*batch, n, r), wide) / jnp.sqrt(n).astype(wide)
        kind = mu_dtype or wide
        return _Matrix(
            U=jnp.zeros((*batch, m, r), kind, out_sharding=layout.row_sharding(leaf, minor=True)),
            s=jnp.zeros((*batch, r), kind, out_sharding=layout.batch_sharding(leaf)),
            V=reshard(V.astype(kind), layout.col_sharding(leaf, minor=True)),
            R=R,
            C=C,
            saliency_row=jnp.zeros_like(R) if saliency else optax.MaskedNode(),
            saliency_col=jnp.zeros_like(C) if saliency else optax.MaskedNode(),
        )

    def init(params: optax.Params) -> ScaleByMomaState:
        params = unboxed(params)
        names, leaves = named_leaves(params, is_leaf=is_none)
        kinds = layouts(params, weight_dimension_numbers, min_dim_size_to_factor)
        entries = [init_leaf(*args) for args in zip(names, leaves, kinds, strict=True)]
        # Three arrays, not one used three times: donation forbids a buffer that appears twice.
        scalars = (jnp.zeros((), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32))
        return ScaleByMomaState(*scalars, **to_trees(params, entries, _FIELDS))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        plain = unboxed(updates)
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        hyper = _Hyper(
            b1, b2, eps, residual, clip_rms, orthogonal_block_size, clip_spectral, rate,
            mu_weight=moments.ema(state.mu_weight, jnp.ones((), jnp.float32), b1),
            nu_weight=moments.ema(state.nu_weight, jnp.ones((), jnp.float32), b2),
        )  # fmt: skip
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        kinds = layouts(plain, weight_dimension_numbers, min_dim_size_to_factor)
        old = to_entries(plain, state, (_Matrix, _Dense))
        steps, entries = [], []
        for g, layout, entry in zip(leaves, kinds, old, strict=True):
            if g is None:
                step, new = None, entry
            elif layout is None:
                step, new = _dense_step(g, entry, hyper)
            else:
                step, new = _matrix_step(g, entry, layout, hyper)
            steps.append(step)
            entries.append(jax.tree.map(lambda x, y: x.astype(y.dtype), new, entry))
        return treedef.unflatten(steps), ScaleByMomaState(
            optax.safe_increment(state.count),
            hyper.mu_weight.astype(jnp.float32),
            hyper.nu_weight.astype(jnp.float32),
            **to_trees(plain, entries, _FIELDS),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _matrix_step(
    g: jax.Array, state: _Matrix, layout: Layout, hyper: _Hyper
) -> tuple[jax.Array, _Matrix]:
    b1, block_size = hyper.b1, hyper.orthogonal_block_size
    wide = at_least_float32(g.dtype)
    G = layout.to_matrix(g).astype(wide)
    U, s, V, R, C = (x.astype(wide) for x in state[:5])

    R = moments.ema(R, moments.row_sums(jnp.square(G)), hyper.b2)
    C = moments.ema(C, moments.col_sums(jnp.square(unshared(G))), hyper.b2)
    p, q = moments.inverse_root(R, C, hyper.nu_weight, hyper.eps)
    p, q = p[..., :, None], q[..., None, :]

    factors, inside = follow(
        Factors(U, s, V),
        b1,
        # A = (1 - b1) P * G, and P = p q only ever scales rows and columns.
        lambda X: (1 - b1) * p * contract("mn,nr->mr", G, transposed(q) * X),
        lambda X: (1 - b1) * q * contract("mr,mn->rn", p * X, G),
    )
    lengths, B = factors.s / hyper.mu_weight, hyper.residual * inside / (1 - b1)
    high = hyper.residual * p
    m, n = layout.matrix_shape[-2:]

    if block_size is not None:
        K = transposed(factors.V) * lengths[..., None] - B
        step = contract("mr,rn->mn", factors.U, K) + high * G * q
        # Rows of an embedding that no gradient ever reached do not move, and lend others no length.
        reached = jnp.sum((C if m <= n else R) > 0, axis=-1, dtype=wide)[..., None, None]
        reached = jnp.maximum(reached, 1)
        size = jnp.minimum(1, hyper.clip_rms) * jnp.sqrt(reached)
        step = orthogonal_factor(step, block_size, size, reached)
        rows, cols = moments.row_sums(G * step), moments.col_sums(unshared(G) * step)
    else:
        lengths = jnp.minimum(lengths, hyper.clip_spectral * max(m, n) ** 0.5)
        K = transposed(factors.V) * lengths[..., None] - B
        # The step is U K + high G q, and its norm is known before it is formed.
        total = _norm(unshared(high) * G * unshared(q))
        outside = jnp.sqrt(jnp.maximum(total**2 - _norm(B) ** 2, 0))
        norm = jnp.hypot(jnp.linalg.norm(lengths, axis=-1)[..., None, None], outside)
        rms = norm / (m * n) ** 0.5
        clip = jnp.minimum(1, hyper.clip_rms / divisor(rms))
        K, high = clip * K, clip * high
        step = contract("mr,rn->mn", factors.U, K) + high * G * q
        # The sums of G * step, from thin products: read for them, step would have to be stored.
        rows = jnp.sum(factors.U * contract("mn,rn->mr", G, K), axis=-1)
        rows += high[..., 0] * moments.row_sums(_weighted_square(q, G))
        cols = jnp.sum(K * contract("mr,mn->rn", factors.U, G), axis=-2)
        cols += q[..., 0, :] * moments.col_sums(_weighted_square(high, G))

    rate = hyper.learning_rate
    return layout.from_matrix(step, g).astype(g.dtype), _Matrix(
        *factors,
        R,
        C,
        _accumulate(state.saliency_row, rate * rows),
        _accumulate(state.saliency_col, rate * cols),
    )


def _dense_step(g: jax.Array, state: _Dense, hyper: _Hyper) -> tuple[jax.Array, _Dense]:
    G = g.astype(at_least_float32(g.dtype))
    mu = moments.ema(state.mu.astype(G.dtype), G, hyper.b1)
    nu = moments.ema(state.nu.astype(G.real.dtype), jnp.square(jnp.abs(G)), hyper.b2)
    step = mu / hyper.mu_weight * moments.dense_inverse_root(nu, hyper.nu_weight, hyper.eps)
    rms = jnp.sqrt(jnp.mean(jnp.square(jnp.abs(step))))
    step = step * jnp.minimum(1, hyper.clip_rms / divisor(rms))
    descent = hyper.learning_rate * (G.conj() * step).real
    return step.astype(g.dtype), _Dense(mu, nu, _accumulate(state.saliency, descent))


def _check_dtype(name: str, dtype: DTypeLike | None, *allowed: DTypeLike) -> None:
    try:
        known = dtype is None or jnp.dtype(dtype) in allowed
    except TypeError:
        known = False
    if not known:
        names = ", ".join(jnp.dtype(x).name for x in allowed)
        raise ValueError(f"{name} must be None or one of {names}, got {dtype!r}.")


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))


def _weighted_square(weight: jax.Array, G: jax.Array) -> jax.Array:
    weight, G = unshared((weight, G))
    return weight * G * G


def _accumulate(total: Any, term: jax.Array) -> Any:
    return total if isinstance(total, optax.MaskedNode) else total.astype(term.dtype) + term


def moma(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 32,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    min_dim_size_to_factor: int = 128,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    eps: Scalar = 1e-8,
    residual: Scalar | None = None,
    clip_rms: Scalar = 1.0,
    orthogonal_block_size: int | None = 128,
    clip_spectral: Scalar | None = None,
    weight_dimension_numbers: Any = None,
    saliency: bool = True,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank momentum with factored second moments, full-rank updates and decoupled decay.

    A few percent of AdamW's state, which after training is also the curvature that
    :func:`optax_moma.curvature_from` reads for a merge. For a matrix W (m, n) with gradient G at
    step t, with ``w1 = 1 - b1^t``, ``w2 = 1 - b2^t`` and learning rate eta:

    .. math::
        R &\leftarrow b_2 R + (1 - b_2) \textstyle\sum_j G_{ij}^2, \quad
        C \leftarrow b_2 C + (1 - b_2) \textstyle\sum_i G_{ij}^2 \\
        \hat G &= G \odot (R C^T / (w_2 \textstyle\sum R))^{-1/2} \\
        U s V^T &\leftarrow Q Q^T (b_1 U s V^T + (1 - b_1) \hat G), \quad
        Q = orth((b_1 U s V^T + (1 - b_1) \hat G) V) \\
        \Delta &= U (s / w_1) V^T + \tfrac 1 2 (I - Q Q^T) \hat G \\
        \Delta_k &\leftarrow \min(1, clip\_rms) \sqrt n \, (\Delta_k \Delta_k^T)^{-1/2} \Delta_k
        \quad \text{for each block k of rows (of columns, transposed, if m > n)} \\
        W &\leftarrow W - \eta (\Delta + \lambda W)

    State of a matrix: ``(rank + 2) (m + n) + rank`` numbers, saliency included; AdamW holds
    ``2 m n``. All other leaves get Adam's moments. In the equations n counts the columns
    (rows, if m > n) that a gradient ever reached. The best learning rates were two to eight times
    AdamW's in pretraining (``experiments/pretrain``), in fine-tuning half of AdamW's, or AdamW's
    own with ``orthogonal_block_size=None`` (``experiments/glue``).

    Args:
      learning_rate: A number or a schedule.
      rank: Columns of the momentum's factors, an integer >= 1.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moments, in [0, 1).
      min_dim_size_to_factor: A matrix with fewer rows or columns gets Adam's moments.
      weight_decay: Decoupled decay, multiplied by the learning rate.
      mask: Where to decay: a tree of booleans, or a callable from parameters to one.
      eps: See :func:`scale_by_moma`, as for all arguments that follow.
      residual: Multiplies the part of the gradient outside the subspace; None for 0.5, or 1 without
        blocks.
      clip_rms: Largest root mean square of a matrix's update, or of another leaf's.
      orthogonal_block_size: Rows (or columns) of the shorter side that are made orthogonal to each
        other in an update; None to clip instead.
      clip_spectral: Without blocks, the largest length of a direction of the momentum, in units of
        sqrt(max(m, n)); None for 1.
      weight_dimension_numbers: Which axes of a leaf are fan-in and fan-out. Say it for leaves of
        more than two axes, such as attention heads: :func:`scale_by_moma` has a table.
      saliency: Whether to accumulate the loss decrease along the trajectory, which adds over a
        quarter to the update's memory traffic.
      mu_dtype: Type of the momentum.
      nu_dtype: Type of the second moments and the saliency.
      seed: Seed of the random start of the subspace.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: An argument out of its range; see :func:`scale_by_moma`. A negative weight_decay.
      TypeError: rank, min_dim_size_to_factor or orthogonal_block_size is not a Python integer.
        Under ``optax.inject_hyperparams`` name them in ``static_args``, as well as callables and
        dtypes. Or b1, b2 or eps is an array of a type narrower than float32, as inject_hyperparams
        makes them for gradients in bfloat16 unless it is given ``hyperparam_dtype=jnp.float32``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_moma as om
      >>> params = {"kernel": jnp.ones((128, 256)), "bias": jnp.zeros(256)}
      >>> loss = lambda p: jnp.mean((jnp.ones(128) @ p["kernel"] + p["bias"]) ** 2)
      >>> tx = om.moma(optax.cosine_decay_schedule(0.5, 100), rank=4)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 10)  # from 16384
      True

    Source: :func:`scale_by_moma` names the origins of the parts.
    """
    if not callable(weight_decay):  # some versions of Optax take a schedule
        check_not_negative("weight_decay", weight_decay)
    return optax.chain(
        scale_by_moma(
            rank,
            b1,
            b2,
            eps=eps,
            residual=residual,
            clip_rms=clip_rms,
            orthogonal_block_size=orthogonal_block_size,
            clip_spectral=clip_spectral,
            min_dim_size_to_factor=min_dim_size_to_factor,
            weight_dimension_numbers=weight_dimension_numbers,
            saliency=saliency,
            learning_rate=learning_rate,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
            seed=seed,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
