"""Globs on leaf paths: which leaves a rule means, what a leaf is called elsewhere, and short lists.

``*`` stands for anything within one part of a path, ``**`` for any parts, ``?`` for one character,
``{a,b}`` for one of several texts, ``{0..3}`` for one of a range of numbers. As in bash, a bound
with a leading zero makes all of them as wide: ``{00..11}`` stands for 00, 01 and so on.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

_TOKEN = re.compile(r"\{(\d+)\.\.(\d+)\}|\*\*/|/\*\*\Z|\*\*|\*|\?|[{},]|[^*?{},/]+|/")
_WILD = {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def matches(globs: Iterable[str], names: Iterable[str]) -> list[str]:
    """Returns the names that one of the globs matches.

    Raises:
      ValueError: if a glob has an open brace, or a range that runs backwards.
    """
    patterns = [re.compile(_regex(glob)[0]) for glob in globs]
    return [name for name in names if any(p.fullmatch(name) for p in patterns)]


def assigned(globs: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Returns for each name the first glob that matches it.

    Raises:
      ValueError: if a name is left over, or a glob has none, with all that is wrong.
    """
    found: dict[str, str] = {}
    problems = []
    for glob in globs:
        own = matches([glob], names)
        if not own:
            problems.append(
                f"{glob!r} matches none of {len(names)} leaves; the closest path is "
                f"{closest(glob, names)}"
            )
        elif all(name in found for name in own):
            problems.append(
                f"every leaf that {glob!r} matches falls under an earlier glob; put the narrower "
                "one first"
            )
        for name in own:
            found.setdefault(name, glob)
    left = [name for name in names if name not in found]
    if left:
        more = f", and {len(left) - 5} more" if len(left) > 5 else ""
        problems.append(f"no glob matches {', '.join(left[:5])}{more}; end with '**' for the rest")
    if problems:
        raise ValueError("; ".join(problems))
    return found


def renamed(renames: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Returns names with each that a glob matches in the form that the glob is mapped to.

    What the wildcards matched comes back in the same order: ``{"h.*/**": "layers_*/**"}``.

    Raises:
      ValueError: if the wildcards of the two sides differ, a glob matches nothing, or two leaves
        would have one name.
    """
    rules, problems = [], []
    for old, new in renames.items():
        try:
            (pattern, wild), (_, wild_after) = _regex(old), _regex(new)
            if wild != wild_after:
                raise ValueError(
                    f"{old!r} has the wildcards {' '.join(wild) or 'none'}, but {new!r} has "
                    f"{' '.join(wild_after) or 'none'}; give both the same, in one order"
                )
            if "{" in new:
                raise ValueError(f"{new!r}: braces stand for several names; a new name is one")
        except ValueError as error:
            problems.append(f"rename: {error}")
            continue
        rules.append((re.compile(pattern), new))
        if not any(rules[-1][0].fullmatch(name) for name in names):
            problems.append(
                f"rename: {old} matches none of {len(names)} leaves; the closest path is "
                f"{closest(old, names)}"
            )
    result = [_renamed(rules, name) for name in names]
    first: dict[str, str] = {}
    for name, new in zip(names, result, strict=True):
        if first.setdefault(new, name) != name:
            problems.append(f"rename: {first[new]} and {name} would both be {new}")
    if problems:
        raise ValueError("; ".join(problems))
    return result


def _renamed(rules: list[tuple[re.Pattern[str], str]], name: str) -> str:
    for pattern, new in rules:
        if found := pattern.fullmatch(name):
            groups = iter(found.groups())
            return "".join(
                next(groups) if token[0] in _WILD else token[0] for token in _TOKEN.finditer(new)
            )
    return name


def _regex(glob: str) -> tuple[str, list[str]]:
    """Returns a regular expression with one group for each wildcard, and the wildcards."""
    result, wild, depth = "", [], 0
    for token in _TOKEN.finditer(glob):
        text = token[0]
        if token[1] is not None:
            low, high = int(token[1]), int(token[2])
            if not low <= high < low + 10_000:
                raise ValueError(f"{glob!r}: {text} is no range of up to 10,000 rising numbers")
            result += "(?:" + "|".join(_numbers(token[1], token[2])) + ")"
        elif text in _WILD:
            wild.append(text)
            result += f"({_WILD[text]})"
        elif text == "{":
            result, depth = result + "(?:", depth + 1
        elif text == "}" and depth:
            result, depth = result + ")", depth - 1
        else:
            result += "|" if text == "," and depth else re.escape(text)
    if depth:
        raise ValueError(f"{glob!r} has an opening brace without a closing one")
    return result, wild


def _numbers(low: str, high: str) -> list[str]:
    """Returns the numbers of a range, all as wide as the bounds if one has a leading zero."""
    padded = any(len(bound) > 1 and bound[0] == "0" for bound in (low, high))
    width = max(len(low), len(high)) if padded else 0
    return [str(n).zfill(width) for n in range(int(low), int(high) + 1)]


def closest(glob: str, names: Sequence[str]) -> str:
    """Returns the name that shares most with a glob; empty if there are no names."""
    plain = re.sub(r"[*?{}]", "", glob)
    score = lambda name: difflib.SequenceMatcher(None, plain, name, autojunk=False).ratio()  # noqa: E731
    return max(names, key=score, default="")


def layers(names: Sequence[str]) -> dict[str, int] | None:
    """Returns each name's layer: the first number in the names that is not the same in all.

    None if a name has no such number.
    """
    numbers = [[int(n) for n in re.findall(r"\d+", name)] for name in names]
    depth = min(map(len, numbers), default=0)
    varying = [i for i in range(depth) if len({found[i] for found in numbers}) > 1]
    position = varying[0] if varying else 0
    if depth <= position:
        return None
    return {name: found[position] for name, found in zip(names, numbers, strict=True)}


def collapsed(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names that differ in their numbers only, under one glob: ``layers_{0..11}/kernel``.

    Only numbers that are the last of a part of the path stand for several.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+(?=/|\Z)", "{}", name), []).append(name)
    result: dict[str, list[str]] = {}
    for key, group in groups.items():
        columns = zip(*(re.findall(r"\d+(?=/|\Z)", name) for name in group), strict=True)
        ranges = [_range(sorted(set(column), key=lambda n: (int(n), n))) for column in columns]
        glob = key.replace("{}", "\0")
        for text in ranges:
            glob = glob.replace("\0", text, 1)
        result[glob] = group
    return result


def _range(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    low, high = numbers[0], numbers[-1]
    if int(high) - int(low) == len(numbers) - 1 and _numbers(low, high) == numbers:
        return f"{{{low}..{high}}}"
    return "{" + ",".join(numbers) + "}"
