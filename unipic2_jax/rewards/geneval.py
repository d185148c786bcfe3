"""GenEval's rules on given detections: which prompt is fulfilled, and how nearly.

The same code scores COCO detections and the shapes world. Rules of the strict verdict: djghosh13/geneval,
`evaluation/evaluate_images.py` (Ghosh et al., 2023). The partial reward is the kind that Flow-GRPO trains on: the mean over
clauses of 1 - |found - wanted| / wanted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Share of the summed extents by which two centres must be apart before a direction is considered.
POSITION_THRESHOLD = 0.1
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclasses.dataclass(frozen=True)
class Detection:
    """One found object: class name, box (x0, y0, x1, y1) in pixels, colour and size names where they were classified."""

    name: str
    box: tuple[float, float, float, float]
    color: str | None = None
    size: str | None = None


@dataclasses.dataclass(frozen=True)
class GenEvalScore:
    """`correct` is the strict verdict, `reward` the partial credit in [0, 1], `extras` objects that nobody asked for."""

    correct: bool
    reward: float
    extras: int
    reasons: tuple[str, ...]


def relative_position(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies as seen from `b`: a subset of 'left of', 'right of', 'above', 'below'."""
    offset, cleared = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        extents = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        offset.append(distance)
        cleared.append(math.copysign(max(abs(distance) - POSITION_THRESHOLD * extents, 0.0), distance))
    if max(map(abs, cleared)) < 1e-3:
        return set()
    dx, dy = (value / math.hypot(*offset) for value in cleared)
    directions = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in directions.items() if holds}


def score(detections: Sequence[Detection], metadata: Mapping[str, Any], *, exact: bool = False) -> GenEvalScore:
    """Scores one image's detections (most confident first) against one line of GenEval metadata.

    Args:
      exact: also count as errors what GenEval lets pass: objects that the prompt does not ask for, and more of those that
        it does. Reinforcement finds that hole at once.

    Raises:
      ValueError: when a position clause names a clause that does not come before it.
    """
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        by_class.setdefault(detection.name, []).append(detection)

    clauses: list[float] = []
    reasons: list[str] = []
    groups: list[list[Detection]] = []
    for place, clause in enumerate(metadata["include"]):
        name, wanted = clause["class"], clause["count"]
        all_found = by_class.get(name, [])
        found = all_found[:wanted]
        counted = len(all_found) if exact else min(len(all_found), wanted)
        clauses.append(max(0.0, 1 - abs(counted - wanted) / wanted))
        if len(found) < wanted or (exact and len(all_found) > wanted):
            reasons.append(f"expected {wanted} {name}, found {len(all_found)}")
        # GenEval knows colours; sizes are an extension of the shapes world.
        for attribute in ("color", "size"):
            if attribute in clause:
                seen = [getattr(detection, attribute) for detection in found]
                clauses.append(seen.count(clause[attribute]) / wanted)
                if clauses[-1] < 1:
                    reasons.append(f"expected {clause[attribute]} {name}, found {seen}")
        if "position" in clause:
            relation, target = clause["position"]
            if not 0 <= target < place:
                raise ValueError(
                    f"Clause {place} of {metadata.get('prompt')!r} is placed relative to clause {target}, which does not come before it."
                )
            holds = bool(found and groups[target]) and all(
                relation in relative_position(a, b) for a in found for b in groups[target]
            )
            clauses.append(float(holds))
            if not holds:
                reasons.append(f"expected {name} {relation} {metadata['include'][target]['class']}")
        groups.append(found)
    for clause in metadata.get("exclude", ()):
        found_count = len(by_class.get(clause["class"], []))
        if found_count >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} {clause['class']}, found {found_count}")

    wanted_total: dict[str, int] = {}
    for clause in metadata["include"]:
        wanted_total[clause["class"]] = wanted_total.get(clause["class"], 0) + clause["count"]
    extras = sum(max(0, len(found) - wanted_total.get(name, 0)) for name, found in by_class.items())
    if exact:
        clauses.append(1 / (1 + extras))
        if extras:
            reasons.append(f"found {extras} objects that were not asked for")
    return GenEvalScore(not reasons, float(np.mean(clauses)), extras, tuple(reasons))
