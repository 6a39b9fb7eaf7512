"""Methods as peft has them, where they differ from ours.

peft merges the task vectors of adapters; here they are added to the base. Its functions, and what
they are here:

- ``task_arithmetic``: ``task_arithmetic(scale=1.0)``
- ``dare_linear``: ``dare(density)``
- ``magnitude_prune``: ``chain(trim(density), total())``
- ``ties``, ``dare_ties``: below. Their election is on task vectors without their weights, a tied
  vote goes to the positive sign, and the weighted sum is divided by the number of experts that
  agree.

Where a trim cuts through entries of one magnitude, peft keeps some of them; ours keeps all. Of a
leaf so small that the density keeps less than one entry, peft keeps none, ours one.

Source: peft 0.21.2, which the tests compare with.
"""

from typing import Literal

from optax_moma.merging import _contract, _steps


def _merged(sparsify: _contract.Step, vote: Literal["unweighted", "count"]) -> _steps.Chain:
    if vote not in ("unweighted", "count"):
        raise ValueError(f"vote must be 'unweighted' or 'count', got {vote!r}.")
    return _steps.chain(sparsify, _steps.elect(vote=vote, tied="positive"), _steps.mean(by="count"))


def ties(
    density: _steps.Number = 0.5, vote: Literal["unweighted", "count"] = "unweighted"
) -> _steps.Chain:
    """TIES with an unweighted vote, divided by the number that agree.

    m_t = [|d_t| >= its k-th largest, k = density * n], per leaf;
    sign = sign(sum_t m_t d_t), or +1 if that is 0; a_t = m_t [sign(d_t) == sign];
    merged = base + sum_t w_t a_t d_t / sum_t a_t, and base where nobody is left.

    Needs a base; takes any number of experts.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      vote: "unweighted", by size, or "count", one vote for each expert; peft's
        ``majority_sign_method`` "total" and "frequency".

    Returns:
      A method for ``merge``: ``chain(trim(density), elect(vote=vote, tied="positive"),
      mean(by="count"))``.

    Raises:
      ValueError: if the density is out of range, or the switch neither.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, peft
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([-3., 1.])}]
      >>> merge(peft.ties(density=1.0), experts, base={"w": jnp.zeros(2)}, weights=[0.5, 0.3])
      {'w': Array([1.5, 0.4], dtype=float32)}

    Source: ``peft.utils.merge_utils.ties``.
    """
    return _merged(_steps.trim(density), vote)


def dare_ties(
    density: _steps.Number = 0.5, vote: Literal["unweighted", "count"] = "unweighted"
) -> _steps.Chain:
    """DARE, then the election and the mean of ``ties``.

    m_t ~ Bernoulli(density); e_t = m_t d_t / density; the rest as in ``ties``, with e_t for d_t.

    Needs a base and a key; takes any number of experts.

    Args:
      density: Share of entries kept on average, from 0 to 1.
      vote: As in ``ties``.

    Returns:
      A method for ``merge``: ``chain(drop(density), elect(vote=vote, tied="positive"),
      mean(by="count"))``.

    Raises:
      ValueError: if the density is out of range, or the switch neither.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import merge, peft
      >>> experts, base = [{"w": jnp.ones(2)}] * 2, {"w": jnp.zeros(2)}
      >>> merge(peft.dare_ties(density=1.0), experts, base=base, key=jax.random.key(0))
      {'w': Array([1., 1.], dtype=float32)}

    Source: ``peft.utils.merge_utils.dare_ties``.
    """
    return _merged(_steps.drop(density), vote)
