"""GenEval's 553 official prompts, which measure, and prompts in their format for training, none of which says what one of them says.

Templates: djghosh13/geneval, `prompts/create_prompts.py`; the official file (MIT, `assets/geneval/LICENSE`) is in the package.
What a prompt says is told by a short hash of its canonical form, which is free of order: 'a dog and a cat' is 'a cat and a dog',
and a position is its two objects and its axis, so that 'a dog right of a cat', 'a cat left of a dog' and 'a cat right of a dog'
are one.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unipic2_jax.data.prompts import SOURCES, JSONLSource
from unipic2_jax.rewards.geneval.classes import CLASSES, GENEVAL
from unipic2_jax.rewards.geneval.rules import COLORS, RELATIONS, TAGS, check_metadata

NUMBERS = {2: "two", 3: "three", 4: "four"}
# What has a colour: no 'red person'.
COLORED = tuple(name for name in CLASSES if name != "person")
AXES = {"left of": "beside", "right of": "beside", "above": "over", "below": "over"}
DIGEST_LENGTH = 8  # hexadecimal digits

# Of each tag, how many values each of the numbers has that `metadata` takes. Of two different things, the second number skips
# the first thing.
DIMENSIONS = {
    "single_object": (len(CLASSES),),
    "two_object": (len(CLASSES), len(CLASSES) - 1),
    "counting": (len(CLASSES), len(NUMBERS)),
    "colors": (len(COLORED), len(COLORS)),
    "position": (len(CLASSES), len(CLASSES) - 1, len(RELATIONS)),
    "color_attr": (len(COLORED), len(COLORED) - 1, len(COLORS), len(COLORS) - 1),
}


def with_article(words: str) -> str:
    """'an apple', 'a bus'."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """As the official prompts have it: 'buses', but also 'skises' and 'knifes'."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def metadata(tag: str, numbers: tuple[int, ...]) -> dict[str, Any]:
    """The prompt of a tag that has these numbers, as a line of GenEval's file. Lengths of the ranges: `DIMENSIONS`."""
    other = lambda first, second: second + (second >= first)
    if tag == "single_object":
        name = CLASSES[numbers[0]]
        include, text = [{"class": name, "count": 1}], with_article(name)
    elif tag == "two_object":
        names = CLASSES[numbers[0]], CLASSES[other(*numbers)]
        include, text = [{"class": name, "count": 1} for name in names], " and ".join(map(with_article, names))
    elif tag == "counting":
        name, count = CLASSES[numbers[0]], list(NUMBERS)[numbers[1]]
        include, text = [{"class": name, "count": count}], f"{NUMBERS[count]} {plural(name)}"
    elif tag == "colors":
        name, color = COLORED[numbers[0]], COLORS[numbers[1]]
        include, text = [{"class": name, "count": 1, "color": color}], f"{with_article(color)} {name}"
    elif tag == "position":
        placed, anchor, relation = CLASSES[numbers[0]], CLASSES[other(*numbers[:2])], RELATIONS[numbers[2]]
        include = [{"class": anchor, "count": 1}, {"class": placed, "count": 1, "position": [relation, 0]}]
        text = f"{with_article(placed)} {relation} {with_article(anchor)}"
    elif tag == "color_attr":
        names = COLORED[numbers[0]], COLORED[other(*numbers[:2])]
        colors = COLORS[numbers[2]], COLORS[other(*numbers[2:])]
        include = [{"class": name, "count": 1, "color": color} for name, color in zip(names, colors)]
        text = " and ".join(f"{with_article(color)} {name}" for name, color in zip(names, colors))
    else:
        raise ValueError(f"'{tag}' is not a GenEval tag; use one of {', '.join(TAGS)}.")
    # The order of the keys is the official file's.
    exclude = {"exclude": [{"class": name, "count": count + 1}]} if tag == "counting" else {}
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {text}"}


def canonical(row: Mapping[str, Any]) -> str:
    """What a prompt asks for, whatever the order: '1 blue dog + 1 red cup', '1 cat + 1 dog beside'."""
    things = [" ".join(filter(None, (str(c["count"]), c.get("color"), c["class"]))) for c in row["include"]]
    axes = {AXES[c["position"][0]] for c in row["include"] if "position" in c}
    return " ".join([" + ".join(sorted(things)), *sorted(axes)])


def digest(row: Mapping[str, Any]) -> str:
    """The first digits of the SHA-256 of the canonical form."""
    return hashlib.sha256(canonical(row).encode()).hexdigest()[:DIGEST_LENGTH]


def digests(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those of all rows, sorted, each once."""
    return sorted({digest(row) for row in rows})


@SOURCES.register("geneval")
class OfficialSource(JSONLSource):
    """GenEval's official prompts, for measuring. `shuffle`: fewer than all are then of all tags; `rewritten`: the same at length."""

    def __init__(self, seed: int = 0, shuffle: bool = True, task: str | None = "t2i", rewritten: bool = False):
        file = "rewritten_metadata.jsonl" if rewritten else "evaluation_metadata.jsonl"
        super().__init__(str(GENEVAL / file), seed, shuffle, task)


@functools.cache
def official() -> frozenset[str]:
    """Digests of the official prompts."""
    return frozenset(digests(row["metadata"] for row in OfficialSource().rows))


def read_digests(path: str | Path) -> frozenset[str]:
    """Digests of the prompts in another file of GenEval's format.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: for a line that is not in that format.
    """
    source = JSONLSource(str(path))
    rows = [row["metadata"] for row in source.rows]
    for number, row in enumerate(rows):
        try:
            check_metadata(row)
        except ValueError as error:
            raise ValueError(f"{source.place(number)}: {error}") from error
    return frozenset(digests(rows))


def _candidates(tag: str, seed: int) -> Iterator[dict[str, Any]]:
    """All prompts of a tag in an order of their own."""
    shape = DIMENSIONS[tag]
    for place in np.random.default_rng((seed, TAGS.index(tag))).permutation(np.prod(shape)):
        yield metadata(tag, tuple(int(number) for number in np.unravel_index(place, shape)))


def generate(
    counts: Mapping[str, int], seed: int = 0, exclude: Collection[str] = (), allow_official: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Different prompts in random order, `counts[tag]` of each tag; more of one tag do not change those of another.

    Args:
      exclude: digests of what no prompt may say, beside the official ones.
      allow_official: tags whose official prompts may come too. All of 'single_object' are official.

    Raises:
      ValueError: for an unknown tag, or when a tag has fewer prompts.
    """
    if unknown := (set(counts) | set(allow_official)) - set(TAGS):
        raise ValueError(f"'{sorted(unknown)[0]}' is not a GenEval tag; use one of {', '.join(TAGS)}.")
    rows = []
    for tag, count in counts.items():
        if count < 0:
            raise ValueError(f"{count} prompts with the tag '{tag}' are wanted; use 0 or more.")
        barred = frozenset(exclude) | (frozenset() if tag in allow_official else official())
        found: list[dict[str, Any]] = []
        candidates = _candidates(tag, seed)
        while len(found) < count:
            row = next(candidates, None)
            if row is None:
                raise ValueError(
                    f"The tag '{tag}' has only {len(found)} prompts beside the excluded ones, not {count}; ask for fewer, or "
                    "allow its official ones."
                )
            if digest(row) not in barred:
                found.append(row)
        rows += found
    order = np.random.default_rng((seed, len(TAGS))).permutation(len(rows))
    return [rows[place] for place in order]


def write_prompts(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """As JSON lines that `data.prompts.JSONLSource` and GenEval's own scripts read."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
