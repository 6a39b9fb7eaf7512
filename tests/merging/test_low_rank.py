"""Spectral methods where experts have few directions: frozen matrices, LoRA, equal experts."""

import numpy as np
import pytest

from optax_moma.merging import doge, iso_c, iso_cts, merge, tsv_m

M, N = 24, 18
METHODS = {"tsv_m": tsv_m(), "iso_c": iso_c(), "iso_cts": iso_cts(common=0.5)}


def drawn(seed, rank):
    """Returns a matrix of whole numbers, which is of its rank exactly, in float32 too."""
    rng = np.random.default_rng(seed)
    if rank == N:
        return rng.integers(-50, 51, size=(M, N)).astype(np.float64)
    parts = (rng.integers(-5, 6, size=shape) for shape in ((M, rank), (rank, N)))
    return np.matmul(*parts).astype(np.float64)


EXPERTS = {
    "of full rank": (drawn(0, N), drawn(1, N)),
    "one frozen": (drawn(0, N), drawn(0, 0)),
    "of rank 4": (drawn(2, 4), drawn(3, 4)),
    "equal": (drawn(0, N), drawn(0, N)),
}


def merged(method, experts):
    trees = [{"w": x.astype(np.float32)} for x in experts]
    return merge(method, trees, base={"w": np.zeros((M, N), np.float32)})["w"]


def directions(x, most=N, size=None):
    """Returns the leading singular triplets, but none of values that are zero in float64."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = min(most, np.sum(s > 1e-12 * (np.linalg.norm(x) if size is None else size)))
    return u[:, :rank], s[:rank], vt[:rank]


def joined(parts, flat):
    us, ss, vts = zip(*parts, strict=True)
    (p, _, qt), (g, _, ht) = (directions(x) for x in (np.hstack(us), np.vstack(vts)))
    s = np.concatenate(ss)
    return (p @ qt * (np.full_like(s, s.mean()) if flat else s)) @ (g @ ht)


def formula(name, experts):
    if name == "iso_c":
        return joined([directions(sum(experts))], flat=True)
    if name == "tsv_m":
        return joined([directions(x, N // 2) for x in experts], flat=False)
    own = round((N - N // 2) / 2)
    x = [e.T for e in experts]
    common = directions(sum(x), N - 2 * own)
    rest = [x_t - common[0] @ common[0].T @ x_t for x_t in x]
    sizes = [np.linalg.norm(x_t) for x_t in x]
    parts = [directions(r, own, size) for r, size in zip(rest, sizes, strict=True)]
    return joined([common, *parts], flat=True).T


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_the_formula_of_the_directions_that_there_are(name, kind):
    want = formula(name, EXPERTS[kind])
    got = merged(METHODS[name], EXPERTS[kind])
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", [*METHODS, "doge"])
def test_experts_of_rank_four_stay_in_their_span_whatever_the_order_of_units(name):
    method = {**METHODS, "doge": doge(norm=1.0, learning_rate=1e-2, steps=5)}[name]
    experts = EXPERTS["of rank 4"]
    got = merged(method, experts)
    if name != "doge":  # Adam's steps go by signs, entry by entry.
        u = directions(np.hstack(experts))[0]
        v = directions(np.vstack(experts))[2]
        np.testing.assert_allclose(got, u @ u.T @ got @ v.T @ v, atol=1e-5 * np.abs(got).max())
    rng = np.random.default_rng(4)
    rows, columns = rng.permutation(M), rng.permutation(N)
    again = merged(method, [x[rows][:, columns] for x in experts])
    np.testing.assert_allclose(again, got[rows][:, columns], atol=1e-5 * np.abs(got).max())
