"""Numbers of a merge found by Bayesian optimisation of a score, and DF-Merge, which needs it."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from optax_moma.merging import _steps
from optax_moma.merging._diagonal import task_arithmetic
from optax_moma.merging._merge import merge
from optax_moma.merging._trees import Tree, each_float, wide


class Search(NamedTuple):
    """What ``search`` returns.

    Attributes:
      numbers: The numbers with the highest score, by name; of equals the first.
      score: Their score.
      trials: All numbers that were tried and their scores, in order.
    """

    numbers: dict[str, float]
    score: float
    trials: list[tuple[dict[str, float], float]]


def search(
    score: Callable[..., Any],
    bounds: Mapping[str, tuple[float, float]],
    *,
    start: Sequence[Mapping[str, float]] = (),
    random: int = 10,
    steps: int = 50,
    seed: int = 0,
) -> Search:
    """Maximises a score over named numbers by Bayesian optimisation.

    Tries the numbers in ``start``, then ``random`` draws from the box, then ``steps`` times the
    numbers with the greatest expected improvement (by 0.01 at least) under a Gaussian process that
    is fitted to all scores so far. The same seed and scores give the same trials.

    Tune on other data than you report: the best of many noisy scores is too good.

    Args:
      score: Called with the numbers as keywords; returns a number, higher is better.
      bounds: The least and the greatest value of each number, by name.
      start: Numbers to be tried first, such as a method's defaults: the result is then at least
        as good.
      random: How many random trials follow, at least 1 with the trials of ``start``.
      steps: How many chosen trials follow.
      seed: Seed of the draws.

    Returns:
      The best numbers, their score, and all trials.

    Raises:
      ImportError: if the package ``bayesian-optimization`` is not installed.
      TypeError: if a score is no number.
      ValueError: if there are no bounds or no trials, bounds or starting numbers are wrong, or a
        score is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, search, ties
      >>> base, experts = {"w": jnp.zeros(2)}, [{"w": jnp.array([3., 1.])}]
      >>> def score(scale, density):
      ...     merged = merge(ties(density, scale), experts, base=base)["w"]
      ...     return -jnp.sum((merged - jnp.array([1.5, 0.])) ** 2)
      >>> found = search(score, {"scale": (0, 1), "density": (0.1, 0.9)}, random=5, steps=10)
      >>> f"{found.numbers['scale']:.1f}, {found.score:.1f}, {len(found.trials)} trials"
      '0.5, -0.0, 15 trials'

    Source: the settings of Lee et al. 2025, "Dynamic Fisher-weighted Model Merging via Bayesian
    Optimization" (arXiv 2504.18992).
    """
    try:
        from bayes_opt import BayesianOptimization
        from bayes_opt.acquisition import ExpectedImprovement
    except ImportError as error:
        raise ImportError(
            'search needs bayesian-optimization: python -m pip install "optax-moma[search]"'
        ) from error
    _check_bounds(bounds, start)
    if random + len(start) < 1 or min(random, steps) < 0:
        raise ValueError(
            f"random and steps must not be negative, and the first trial is random or in start; "
            f"got random={random}, steps={steps} and {len(start)} in start."
        )
    box = {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
    optimizer = BayesianOptimization(
        None,
        box,
        ExpectedImprovement(xi=0.01),
        random_state=seed,
        verbose=0,
        allow_duplicate_points=True,
    )
    trials: list[tuple[dict[str, float], float]] = []

    def attempt(numbers: Mapping[str, Any]) -> None:
        named = {name: float(numbers[name]) for name in box}
        value = _number(score(**named), named)
        optimizer.register(named, value)
        trials.append((named, value))

    for numbers in [*start, *(optimizer.random_sample(random) if random else [])]:
        attempt(numbers)
    for _ in range(steps):
        attempt(optimizer.suggest())
    numbers, best = max(trials, key=lambda trial: trial[1])
    return Search(numbers, best, trials)


def _check_bounds(bounds: Any, start: Sequence[Mapping[str, float]]) -> None:
    if not isinstance(bounds, Mapping) or not bounds:
        raise ValueError(
            f'bounds must give at least one number its range, such as {{"scale": (0.1, 1.5)}}, '
            f"got {bounds!r}."
        )
    for name, pair in bounds.items():
        if not (isinstance(pair, Sequence) and len(pair) == 2 and -math.inf < pair[0] < pair[1]
                < math.inf):  # fmt: skip
            raise ValueError(f"bounds: {name} must have (least, greatest), got {pair!r}.")
    for numbers in start:
        if set(numbers) != set(bounds):
            raise ValueError(
                f"start: {dict(numbers)} must have the names in bounds, {list(bounds)}."
            )
        for name, (low, high) in bounds.items():
            if not low <= numbers[name] <= high:
                raise ValueError(
                    f"start: {name}={numbers[name]} is outside its bounds ({low}, {high})."
                )


def _number(value: Any, numbers: Mapping[str, float]) -> float:
    if not hasattr(value, "__float__") or getattr(value, "shape", ()) != ():
        raise TypeError(f"score must return a number; for {dict(numbers)} it returned {value!r}.")
    if not math.isfinite(value):
        raise ValueError(
            f"score: it is {value} for {dict(numbers)}; return a low number for what failed."
        )
    return float(value)


def df_merge(
    coefficients: Sequence[float] | Mapping[str, float],
    experts: Sequence[Tree] | Mapping[str, Tree],
    fisher: Callable[[Any, Tree], Tree],
    *,
    base: Tree,
) -> Tree:
    """Merges scaled experts by their Fisher information where they have been scaled to.

    merged = base + T * sum_t F_t c_t d_t / sum_t F_t, entrywise, with d_t = expert_t - base, T the
    number of experts, and F_t the Fisher information of task t at base + c_t d_t. Where every F_t
    is zero they count the same, and c_t d_t are added up.

    DF-Merge is the search for the coefficients: with ``score(params)`` the mean validation accuracy
    of all tasks,

        found = search(
            lambda **c: score(df_merge(c, experts, fisher, base=base)),
            {name: (0, 1) for name in experts},
        )
        params = df_merge(found.numbers, experts, fisher, base=base)

    Args:
      coefficients: One number per expert, a list or a dict as ``experts`` is.
      experts: Trees of params, a list or a dict by name.
      fisher: A function of an expert's name (its index in a list) and of params that returns the
        diagonal Fisher information of its task there, for example ``lambda t, params:
        diagonal_fisher(apply[t], params, batches[t])``. The paper takes 30 validation examples.
      base: The params that the experts were fine-tuned from.

    Returns:
      A tree like the base, in its dtypes.

    Raises:
      ValueError: if the coefficients are not those of the experts, or anything is wrong with the
        inputs of the merge.

    Example:
      >>> import jax.numpy as jnp
      >>> experts = {"math": {"w": jnp.array([1., 0.])}, "code": {"w": jnp.array([0., 2.])}}
      >>> fisher = lambda name, params: {"w": jnp.array([3., 1.] if name == "math" else [1., 1.])}
      >>> df_merge({"math": 1.0, "code": 0.5}, experts, fisher, base={"w": jnp.zeros(2)})["w"]
      Array([1.5, 1. ], dtype=float32)

    Source: Lee et al. 2025, "Dynamic Fisher-weighted Model Merging via Bayesian Optimization"
    (arXiv 2504.18992), with the factor T of the published code.
    """
    named: dict[Any, Tree] = (
        dict(experts) if isinstance(experts, Mapping) else dict(enumerate(experts))
    )
    given: dict[Any, float] = (
        dict(coefficients) if isinstance(coefficients, Mapping) else dict(enumerate(coefficients))
    )
    if set(given) != set(named):
        raise ValueError(
            f"coefficients are for {list(given)}, but the experts are {list(named)}; give each one."
        )
    # Wide until the end: the scaled experts are rounded for their Fisher information only.
    start = each_float(wide, base, other=jnp.asarray)
    narrow = partial(each_float, lambda b, x: x.astype(jnp.asarray(b).dtype), base)
    scaled = [merge(task_arithmetic(given[name]), [named[name]], base=start) for name in named]
    curvature = [
        fisher(name, narrow(params, other=jnp.asarray))
        for name, params in zip(named, scaled, strict=True)
    ]
    method = _steps.chain(
        _steps.weigh(1.0, normalize=False), _steps.mean(), _steps.scale(float(len(scaled)))
    )
    merged = merge(method, scaled, base=start, curvature=curvature)
    return narrow(merged, other=jnp.asarray)
