"""ImgEdit-Bench's arithmetic: three marks from 1 to 5 in a judge's words, means of an item, of a type, and both overall means.

Source: PKU-YuanGroup/ImgEdit, its basic benchmark (Ye et al., 2025). Its own reader takes a mark only from a line that ': ' splits into two,
the second of digits alone, so it loses '4/5', '**Prompt Compliance:** 4' and '4.'; `as_published` does the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from unipic2_jax.core.strict import excerpt

MARKS = 3
LOW, HIGH = 1, 5
# 'Name: 4', '**Name:** 4/5', 'Name: **4**.': a whole number alone behind a colon, of 5 or not.
MARK_LINE = re.compile(r"[^:]*[^\W\d_][^:]*:[\s*_]*(\d+)(?:\s*/\s*5)?[\s*_]*\.?[\s*_]*")


def read_marks(answer: str, as_published: bool = False) -> tuple[int, int, int]:
    """The three marks of an answer, in its order.

    Raises:
      ValueError: when there are not three, or one lies outside of 1 to 5.
    """
    lines = answer.splitlines()
    marks = [mark for line in lines if (mark := _published(line) if as_published else _mark(line)) is not None]
    if len(marks) != MARKS:
        raise ValueError(f"The judge's answer has {len(marks)} marks and not {MARKS}: '{excerpt(answer)}'.")
    if not all(LOW <= mark <= HIGH for mark in marks):
        raise ValueError(f"The judge's answer has marks outside of {LOW} to {HIGH}: {marks}.")
    return marks[0], marks[1], marks[2]


def means(marks: Mapping[str, Sequence[int]], types: Mapping[str, str]) -> dict[str, float]:
    """The means of items that have marks.

    Args:
      marks: key -> its three marks; types: key -> its type, also of items without marks.

    Returns:
      'types': the mean over types, which most papers report; 'items': over all items; and '{type}'. Means of items and of types are
      rounded to two digits before they are averaged, as in the benchmark. Empty when nothing has marks.
    """
    items = {key: round(sum(three) / MARKS, 2) for key, three in marks.items()}
    by_type: dict[str, list[float]] = {}
    for key, mean in items.items():
        by_type.setdefault(types[key], []).append(mean)
    if not items:
        return {}
    of_types = {name: round(float(np.mean(by_type[name])), 2) for name in sorted(by_type)}
    return {"types": float(np.mean(list(of_types.values()))), "items": float(np.mean(list(items.values()))), **of_types}


def _mark(line: str) -> int | None:
    found = MARK_LINE.fullmatch(line.strip())
    return int(found[1]) if found else None


def _published(line: str) -> int | None:
    parts = line.strip().split(": ")
    return int(parts[1]) if len(parts) == 2 and parts[1].isdecimal() else None
