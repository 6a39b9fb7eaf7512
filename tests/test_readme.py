"""The README's examples run, in order, each on its own."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example):
    pytest.importorskip("flax")
    exec(compile(example, "README.md", "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) == 5


def test_the_merge_lies_between_its_experts():
    names = {}
    (example,) = (text for text in EXAMPLES if "om.merge(" in text)
    exec(compile(example, "README.md", "exec"), names)
    assert names["merged"]["kernel"].shape == (256, 128)
    low, high = (names["experts"][name]["kernel"] for name in ("math", "code"))
    assert ((low <= names["merged"]["kernel"]) & (names["merged"]["kernel"] <= high)).all()
