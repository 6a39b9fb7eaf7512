"""Ranges of numbers in globs, and the globs that stand for several leaves."""

from hypothesis import given
from hypothesis import strategies as st

from optax_moma._globs import collapsed, matches

NAMES = st.builds(
    "{}{}/{}{}".format,
    st.sampled_from(["layers_", "b", ""]),
    st.one_of(st.integers(0, 12), st.integers(0, 12).map("{:02d}".format)),
    st.sampled_from(["kernel", "h", "1x"]),
    st.one_of(st.just(""), st.integers(0, 3), st.integers(8, 11).map("{:03d}".format)),
)


def test_a_bound_with_a_leading_zero_gives_all_its_width():
    """As in bash."""
    for glob, names in {
        "b_{08..11}": ["b_08", "b_09", "b_10", "b_11"],
        "b_{8..11}": ["b_8", "b_9", "b_10", "b_11"],
        "b_{0..2}": ["b_0", "b_1", "b_2"],
        "b_{00..2}": ["b_00", "b_01", "b_02"],
        "b_{01..100}": [f"b_{n:03d}" for n in range(1, 101)],
        "b_{1..02}": ["b_01", "b_02"],
    }.items():
        mixed = [f"b_{n:0{width}d}" for width in (1, 2, 3) for n in range(200)]
        assert sorted(matches([glob], set(mixed))) == sorted(names)


def test_padded_names_have_one_line():
    names = [f"block_{i:02d}/kernel" for i in range(12)]
    assert collapsed(names) == {"block_{00..11}/kernel": names}
    assert list(collapsed(["a/1", "a/01", "a/2"])) == ["a/{01,1,2}"]
    assert list(collapsed(["a/07", "a/09"])) == ["a/{07,09}"]


@given(st.lists(NAMES, unique=True, max_size=30))
def test_each_line_matches_its_leaves_and_no_others(names):
    lines = collapsed(names)
    assert sorted(name for found in lines.values() for name in found) == sorted(names)
    for glob, found in lines.items():
        assert matches([glob], names) == found
