"""The diagonal of the Fisher information, exact for each example: curvature that costs data."""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_moma._tree import at_least_float32, named_leaves
from optax_moma.merging._input_grams import checked_batches

Tree = Any
Labels = Literal["expected", "sampled", "empirical"]
Likelihood = Literal["categorical", "normal"]


def diagonal_fisher(
    apply: Callable[[Tree, Any], jax.Array],
    params: Tree,
    batches: Iterable[Any],
    *,
    labels: Labels = "expected",
    likelihood: Likelihood = "categorical",
    key: jax.Array | None = None,
) -> Tree:
    """Computes the diagonal of the Fisher information from data: a ``curvature`` for any merge.

    F = mean over examples x of E_y[(d log p(y | x) / d params)**2], entrywise, where y is

    - "expected": all classes c, weighed by the model's own p(c | x). Without noise; one backward
      pass per example, class and position.
    - "sampled": one draw from the model. Its expectation is the same; one backward pass per
      example.
    - "empirical": the label in the data. That is the empirical Fisher, which differs: it vanishes
      where the model fits its labels.

    The gradient of each example is squared on its own; the square of a batch's mean gradient is
    something else. Examples are taken one after the other, so memory is that of one example's
    gradient and of F, whatever the sizes and the number of the batches. An output with more axes,
    as a language model's (batch, length, classes), is that many independent labels; at padding,
    let ``apply`` return a constant, which has no gradient.

    Args:
      apply: A function of params and a batch of inputs that returns logits (batch, ..., classes),
        or means (batch, ...) of normal distributions. It is compiled once, as by ``jax.jit``: what
        it takes from outside is fixed by then.
      params: The params at which F is computed, those of one expert.
      batches: Batches of inputs, trees of arrays whose first axis counts examples, or pairs
        (inputs, labels) if "empirical". Each new batch size compiles once.
      labels: "expected", "sampled" or "empirical".
      likelihood: "categorical", with labels (batch, ...) of integers, of which negative ones are
        left out; or "normal" with variance 1, with labels (batch, ...), for regression.
      key: A random key for "sampled". The draws depend on it and on the number of an example, not
        on the division into batches.

    Returns:
      A tree like ``params`` with F in float32 (or float64) at each floating-point leaf, and None
      at all others.

    Raises:
      TypeError: if ``batches`` is one batch.
      ValueError: if a switch is none of its names, there is no example, a key is missing or not
        wanted, the output has no axis for examples, or inputs, labels and outputs do not fit.

    Example:
      >>> from optax_moma.merging import diagonal_fisher
      >>> apply = lambda params, x: x @ params["w"]
      >>> params = {"w": jnp.zeros((2, 2))}
      >>> diagonal_fisher(apply, params, [jnp.array([[1., 0.], [2., 4.]])])["w"]
      Array([[0.625, 0.625],
             [2.   , 2.   ]], dtype=float32)

    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging"
    (arXiv 2111.09832), section 3; on the empirical one Kunstner et al. 2019 (arXiv 1905.12558).
    """
    _check_switches(labels, likelihood, key)
    leaves, treedef = jax.tree.flatten(params)
    kept = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]
    if not any(kept):
        names = ", ".join(named_leaves(params)[0])
        raise ValueError(f"params: no leaf is floating point; the leaves are {names}.")
    floats = [jnp.asarray(x) if keep else None for x, keep in zip(leaves, kept, strict=True)]
    others = [None if keep else x for x, keep in zip(leaves, kept, strict=True)]
    model, total, seen = Model(apply, treedef, labels, likelihood), _zeros(floats), 0
    for batch in checked_batches(batches):
        inputs, label, size = _examples(apply, params, batch, labels, likelihood)
        draws = None
        if key is not None:
            numbers = jnp.arange(seen, seen + size)
            draws = jax.vmap(partial(jax.random.fold_in, key))(numbers)
        total = _add_batch(model)(total, floats, others, (inputs, label, draws))
        seen += size
    if not seen:
        raise ValueError("batches: there is no example. Was a generator used up?")
    return treedef.unflatten([None if x is None else x / seen for x in total])


class Model(NamedTuple):
    """What a compiled step depends on besides arrays: equal ones compile once."""

    apply: Callable[[Tree, Any], jax.Array]
    treedef: Any
    labels: Labels
    likelihood: Likelihood


# Lists with one entry per leaf of the params: an array, or None where the leaf is in the other.
Leaves = list[Any]


def _zeros(floats: Leaves) -> Leaves:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype)), floats)


# Bounded, so that functions and what they hold do not stay in memory for good.
@lru_cache(maxsize=16)
def _add_batch(model: Model) -> Callable[[Leaves, Leaves, Leaves, Any], Leaves]:
    """Returns the compiled function that adds a batch of examples to the sums."""

    @partial(jax.jit, donate_argnums=0)
    def add_batch(total: Leaves, floats: Leaves, others: Leaves, examples: Any) -> Leaves:
        def add(total: Leaves, example: Any) -> tuple[Leaves, None]:
            return jax.tree.map(jnp.add, total, _squares(model, floats, others, example)), None

        return jax.lax.scan(add, total, examples)[0]

    return add_batch


def _squares(model: Model, floats: Leaves, others: Leaves, example: Any) -> Leaves:
    """Returns E_y[(d log p(y | x) / d params)**2] of one example x."""
    inputs, label, draw = example
    batch_of_one = jax.tree.map(lambda x: x[None], inputs)

    def log_likelihoods(floats: Leaves) -> tuple[jax.Array, jax.Array]:
        leaves = [o if x is None else x for x, o in zip(floats, others, strict=True)]
        output = model.apply(model.treedef.unflatten(leaves), batch_of_one)[0]
        return _scores(output, label, draw, model)

    values, gradient_of, weights = jax.vjp(log_likelihoods, floats, has_aux=True)

    def add(total: Leaves, n: jax.Array) -> tuple[Leaves, None]:
        (gradient,) = gradient_of(jnp.zeros_like(values).at[n].set(1))
        return jax.tree.map(
            lambda t, g: t + weights[n] * jnp.square(g.astype(t.dtype)), total, gradient
        ), None

    return jax.lax.scan(add, _zeros(floats), jnp.arange(values.size))[0]


def _scores(output: jax.Array, label: Any, key: Any, model: Model) -> tuple[jax.Array, jax.Array]:
    """Returns the log-likelihoods of one example whose squared gradients count, and their weights.

    Independent positions have independent scores of mean zero, so that the expectation of the
    square of their sum is the sum over positions and classes.
    """
    output = output.astype(at_least_float32(output.dtype))
    fixed = jax.lax.stop_gradient(output)
    if model.likelihood == "normal":
        if model.labels == "expected":
            # The score is (y - mean) times the gradient of the mean, and E[(y - mean)**2] is 1.
            return output.ravel(), jnp.ones(output.size)
        if model.labels == "sampled":
            label = fixed + jax.random.normal(key, output.shape, output.dtype)
        return -0.5 * jnp.sum(jnp.square(label - output))[None], jnp.ones(1)
    logp = jax.nn.log_softmax(output)
    if model.labels == "expected":
        return logp.ravel(), jax.lax.stop_gradient(jnp.exp(logp)).ravel()
    if model.labels == "sampled":
        label = jax.random.categorical(key, fixed)
    chosen = jnp.take_along_axis(logp, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(label >= 0, chosen, 0))[None], jnp.ones(1)


def _check_switches(labels: Any, likelihood: Any, key: Any) -> None:
    for name, value, choices in [
        ("labels", labels, ("expected", "sampled", "empirical")),
        ("likelihood", likelihood, ("categorical", "normal")),
    ]:
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    if (key is None) == (labels == "sampled"):
        raise ValueError(
            'key: labels="sampled" draws labels; pass key=jax.random.key(seed).'
            if key is None
            else f"key: nothing is drawn with labels={labels!r}; leave it out."
        )


def _examples(
    apply: Any, params: Tree, batch: Any, labels: Labels, likelihood: Likelihood
) -> tuple[Any, Any, int]:
    """Returns inputs, labels and the number of examples of a batch, after looking at them."""
    label = None
    if labels == "empirical":
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(
                'batches: labels="empirical" needs pairs (inputs, labels), got '
                f"{type(batch).__name__}."
            )
        batch, label = batch[0], jnp.asarray(batch[1])
    batch = jax.tree.map(jnp.asarray, batch)
    sizes = {x.shape[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "batches: the first axis of all inputs must count examples, got the shapes "
            f"{[x.shape for x in jax.tree.leaves(batch)]}."
        )
    ((size,),) = sizes
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)
    output = jax.eval_shape(apply, params, one)
    shape = getattr(output, "shape", None)
    axes = 2 if likelihood == "categorical" else 1
    if shape is None or len(shape) < axes or shape[0] != 1:
        found = type(output).__name__ if shape is None else f"an array of shape {shape}"
        wanted = "logits (1, ..., classes)" if axes == 2 else "means (1, ...)"
        raise ValueError(f"apply: for one example it must return {wanted}, it returns {found}.")
    if label is not None:
        wanted = (size, *shape[1:-1]) if likelihood == "categorical" else (size, *shape[1:])
        if label.shape != wanted:
            raise ValueError(
                f"batches: the labels have shape {label.shape}; outputs of shape "
                f"{(size, *shape[1:])} need labels of shape {wanted}."
            )
        if likelihood == "categorical" and not (
            jnp.issubdtype(label.dtype, jnp.integer) and np.all(np.asarray(label) < shape[-1])
        ):
            raise ValueError(
                f"batches: labels must be integers below {shape[-1]}, the number of logits, got "
                f"{label.dtype} up to {np.max(np.asarray(label))}."
            )
    return batch, label, size
