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
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclasses.dataclass(frozen=True)
class Detection:
    """One found object.

    Attributes:
      name: of its class.
      box: (x0, y0, x1, y1) in pixels.
      color: its name, where it was classified; so is `size`, which GenEval does not know.
      confidence: 0 to 1.
      mask: bool [h, w], which of the box's pixels belong to it, from a detector that tells.
    """

    name: str
    box: tuple[float, float, float, float]
    color: str | None = None
    size: str | None = None
    confidence: float = 1.0
    mask: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which detections count. The defaults are GenEval's and meant for its Mask2Former; other detectors give other confidences.

    Attributes:
      threshold: a detection counts when its confidence is above.
      counting_threshold: the same for prompts with the tag 'counting'.
      most: of a class; the most confident ones.
      max_overlap: of those, one that overlaps a more confident one of its class by this share (intersection over union) or
        more does not count; 1: all do.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    most: int = 16
    max_overlap: float = 1.0

    def __post_init__(self) -> None:
        for field in ("threshold", "counting_threshold", "max_overlap"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"GenEval's {field} is {getattr(self, field)}; use a share of 0 to 1.")
        if self.most < 1:
            raise ValueError(f"GenEval's 'most' is {self.most}; at least one detection of a class has to count.")

    def confidence(self, metadata: Mapping[str, Any]) -> float:
        """The threshold for this prompt."""
        return self.counting_threshold if metadata.get("tag") == "counting" else self.threshold


@dataclasses.dataclass(frozen=True)
class GenEvalScore:
    """`correct` is the strict verdict, `reward` the partial credit in [0, 1], `extras` objects that nobody asked for."""

    correct: bool
    reward: float
    extras: int
    reasons: tuple[str, ...]


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Whether GenEval's rules can be applied.

    Raises:
      ValueError: when they cannot.
    """
    prompt = repr(metadata.get("prompt"))
    if not metadata.get("include"):
        raise ValueError(
            f"The prompt {prompt} says nothing of what to find, it has no 'include' list; give it GenEval's."
        )
    include, exclude = metadata["include"], metadata.get("exclude", ())
    for name, clauses in {"include": include, "exclude": exclude}.items():
        if not isinstance(clauses, (list, tuple)) or not all(isinstance(clause, Mapping) for clause in clauses):
            raise ValueError(f"What {prompt} has as '{name}' is no list of clauses; write it as GenEval's.")
    for place, clause in enumerate((*include, *exclude)):
        where = f"Clause {place} of {prompt}"
        if not {"class", "count"} <= clause.keys():
            raise ValueError(f"{where} has no 'class' or no 'count'; give it both.")
        if not isinstance(clause["class"], str):
            raise ValueError(f"{where} has the class {clause['class']!r}; write its name.")
        if type(clause["count"]) is not int or clause["count"] < 1:
            raise ValueError(f"{where} wants {clause['count']!r} {clause['class']}; use 1 or more, a whole number.")
    for place, clause in enumerate(include):
        where = f"Clause {place} of {prompt}"
        if "color" in clause and clause["color"] not in COLORS:
            raise ValueError(f"{where} has the color {clause['color']!r}; use one of {', '.join(COLORS)}.")
        if "position" in clause:
            _check_position(where, place, clause["position"])


def _check_position(where: str, place: int, position: Any) -> None:
    if not isinstance(position, (list, tuple)) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(
            f"{where} has the position {position!r}; write a list of one of {', '.join(RELATIONS)} and the number of a clause."
        )
    if type(position[1]) is not int or not 0 <= position[1] < place:
        raise ValueError(f"{where} is placed relative to clause {position[1]!r}, which does not come before it.")


def overlap(a: Detection, b: Detection) -> float:
    """Intersection over union of two boxes whose ends are pixels, both inclusive, as GenEval counts them."""
    area = lambda x0, y0, x1, y1: max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)
    shared = area(*(max(a.box[i], b.box[i]) for i in (0, 1)), *(min(a.box[i], b.box[i]) for i in (2, 3)))
    union = area(*a.box) + area(*b.box) - shared
    return shared / union if union else 0.0


def counted(
    detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules = Rules()
) -> dict[str, list[Detection]]:
    """Detections that count, by class, most confident first; equally confident ones keep their order."""
    by_class: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda found: -found.confidence):
        if detection.confidence > rules.confidence(metadata):
            by_class.setdefault(detection.name, []).append(detection)
    for name, found in by_class.items():
        kept: list[Detection] = []
        for detection in found[: rules.most]:
            if rules.max_overlap == 1 or all(overlap(other, detection) < rules.max_overlap for other in kept):
                kept.append(detection)
        by_class[name] = kept
    return by_class


def relative_position(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies as seen from `b`: a subset of `RELATIONS`."""
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


def score(
    detections: Sequence[Detection], metadata: Mapping[str, Any], *, exact: bool = False, rules: Rules = Rules()
) -> GenEvalScore:
    """Scores one image's detections against one line of GenEval metadata.

    Args:
      exact: also count as errors what GenEval lets pass: objects that the prompt does not ask for, and more of those that
        it does. Reinforcement finds that hole at once.

    Raises:
      ValueError: for metadata that `check_metadata` refuses.
    """
    check_metadata(metadata)
    by_class = counted(detections, metadata, rules)
    clauses: list[float] = []
    reasons: list[str] = []
    groups: list[list[Detection]] = []
    too_many = {
        clause["class"]: clause["count"]
        for clause in metadata.get("exclude", ())
        if len(by_class.get(clause["class"], ())) >= clause["count"]
    }
    for clause in metadata["include"]:
        name, wanted = clause["class"], clause["count"]
        all_found = by_class.get(name, [])
        found = all_found[:wanted]
        number = len(all_found) if exact or name in too_many else min(len(all_found), wanted)
        clauses.append(max(0.0, 1 - abs(number - wanted) / wanted))
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
            holds = bool(found and groups[target]) and all(
                relation in relative_position(a, b) for a in found for b in groups[target]
            )
            clauses.append(float(holds))
            if not holds:
                reasons.append(f"expected {name} {relation} {metadata['include'][target]['class']}")
        groups.append(found)

    wanted_total: dict[str, int] = {}
    for clause in metadata["include"]:
        wanted_total[clause["class"]] = wanted_total.get(clause["class"], 0) + clause["count"]
    for clause in metadata.get("exclude", ()):
        if clause["class"] not in wanted_total:
            clauses.append(float(clause["class"] not in too_many))
    for name, count in too_many.items():
        reasons.append(f"expected fewer than {count} {name}, found {len(by_class[name])}")
    extras = sum(max(0, len(found) - wanted_total.get(name, 0)) for name, found in by_class.items())
    if exact:
        clauses.append(1 / (1 + extras))
        if extras:
            reasons.append(f"found {extras} objects that were not asked for")
    return GenEvalScore(not reasons, float(np.mean(clauses)), extras, tuple(reasons))
