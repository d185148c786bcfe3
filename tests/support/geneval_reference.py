"""GenEval's official prompts, and its verdict by another route: what tests compare with.

The prompts come from the draws that the authors describe in djghosh13/geneval, `prompts/create_prompts.py`: NumPy's generator with
the seed 43, eighty single objects in random order, then a hundred draws of each other tag, of which repetitions are left out.
"""

import functools
import itertools

import numpy as np

from unipic2_jax.rewards.geneval.classes import CLASSES

COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign


@functools.cache
def official_rows() -> tuple[dict, ...]:
    rng = np.random.default_rng(43)
    an = lambda words: ("an " if words[0] in "aeiou" else "a ") + words
    one = lambda index, **more: {"class": CLASSES[index], "count": 1, **more}
    pair = lambda: (int(i) for i in rng.choice(80, size=2, replace=False))
    rows = []

    def add(tag, text, include, **more):
        row = {"tag": tag, "include": include, **more, "prompt": f"a photo of {text}"}
        if row not in rows:
            rows.append(row)

    for index in rng.choice(80, size=80, replace=False):
        add("single_object", an(CLASSES[index]), [one(index)])
    for a, b in (pair() for _ in range(100)):
        add("two_object", f"{an(CLASSES[a])} and {an(CLASSES[b])}", [one(a), one(b)])
    for _ in range(100):
        name, count = CLASSES[rng.choice(80)], int(rng.integers(2, 4, endpoint=True))
        more = {"exclude": [{"class": name, "count": count + 1}]}
        text = f"{('two', 'three', 'four')[count - 2]} {name}{'es' if name[-1] == 's' else 's'}"
        add("counting", text, [{"class": name, "count": count}], **more)
    for _ in range(100):  # index 0 is the person, which has no colour
        index, color = rng.choice(79) + 1, COLORS[rng.choice(10)]
        add("colors", f"{an(color)} {CLASSES[index]}", [one(index, color=color)])
    for _ in range(100):
        (a, b), relation = pair(), list(DIRECTIONS)[rng.choice(4)]
        add("position", f"{an(CLASSES[a])} {relation} {an(CLASSES[b])}", [one(b), one(a, position=[relation, 0])])
    for _ in range(100):
        indices = rng.choice(79, size=2, replace=False) + 1
        colors = [COLORS[i] for i in rng.choice(10, size=2, replace=False)]
        text = " and ".join(f"{an(color)} {CLASSES[index]}" for index, color in zip(indices, colors))
        add("color_attr", text, [one(index, color=color) for index, color in zip(indices, colors)])
    return tuple(rows)


class Scene:
    """Detections of an image as arrays: a table of (confidence, x0, y0, x1, y1) and colours for each class."""

    def __init__(self, detections, threshold, most=16, max_overlap=1.0):
        self.rows, self.colors = {}, {}
        for name in {found.name for found in detections}:
            mine = [found for found in detections if found.name == name and found.confidence > threshold]
            table = np.array([(found.confidence, *found.box) for found in mine]).reshape(-1, 5)
            order = np.argsort(-table[:, 0])[:most]
            if max_overlap < 1:
                order = order[self.survivors(table[order, 1:], max_overlap)]
            if len(order):
                self.rows[name], self.colors[name] = table[order, 1:], [mine[i].color for i in order]

    @staticmethod
    def survivors(boxes, max_overlap):
        """Which of these boxes, best first, no surviving better one overlaps: all pairs at once, then one after the other."""
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = np.clip(high - low + 1, 0, None).prod(-1)
        area = np.clip(boxes[:, 2:] - boxes[:, :2] + 1, 0, None).prod(-1)
        clash = shared >= max_overlap * (area[:, None] + area[None] - shared)
        alive = np.ones(len(boxes), bool)
        for i in range(len(boxes)):
            if alive[i]:
                alive[i + 1 :] &= ~clash[i, i + 1 :]
        return alive

    def number(self, name):
        return len(self.rows.get(name, ()))

    def share_of_color(self, clause):
        colors = self.colors.get(clause["class"], [])[: clause["count"]]
        return sum(color == clause["color"] for color in colors) / clause["count"]

    def stands(self, clause, anchor):
        """Whether the best objects of one clause all lie in its direction from the best ones of another."""
        axis, sign = DIRECTIONS[clause["position"][0]]
        mine, theirs = (self.rows.get(c["class"], np.zeros((0, 4)))[: c["count"]] for c in (clause, anchor))
        if not len(mine) or not len(theirs):
            return False
        a, b = mine.reshape(-1, 1, 2, 2), theirs.reshape(1, -1, 2, 2)  # pairs, corner, axis
        offset = a.mean(2) - b.mean(2)
        room = 0.1 * (abs(a[..., 1, :] - a[..., 0, :]) + abs(b[..., 1, :] - b[..., 0, :]))
        cleared = np.sign(offset) * np.clip(abs(offset) - room, 0, None)
        apart = (abs(cleared) >= 1e-3).any(-1)
        length = np.linalg.norm(offset, axis=-1)
        return bool((apart & (sign * cleared[..., axis] > 0.5 * length)).all())


def verdict(detections, row, **options):
    """(correct, partial credit, extras) by GenEval's rules and the mean over clauses."""
    scene = Scene(detections, 0.9 if row["tag"] == "counting" else 0.3, **options)
    include, exclude = row["include"], row.get("exclude", [])
    enough = [scene.number(c["class"]) >= c["count"] for c in include]
    colors = [scene.share_of_color(c) for c in include if "color" in c]
    stands = [scene.stands(c, include[c["position"][1]]) for c in include if "position" in c]
    over = [scene.number(c["class"]) >= c["count"] for c in exclude]
    correct = all(enough) and min(colors, default=1) == 1 and all(stands) and not any(over)

    crowded = {c["class"] for c, hit in zip(exclude, over) if hit}
    missing = [max(c["count"] - scene.number(c["class"]), 0) / c["count"] for c in include]
    surplus = [
        max(scene.number(c["class"]) - c["count"], 0) / c["count"] if c["class"] in crowded else 0 for c in include
    ]
    amounts = [1 - min(1, a + b) for a, b in zip(missing, surplus)]
    absent = [not hit for c, hit in zip(exclude, over) if c["class"] not in {i["class"] for i in include}]
    partial = float(np.mean([*amounts, *colors, *stands, *absent]))

    asked = dict.fromkeys((c["class"] for c in include), 0)
    for c in include:
        asked[c["class"]] += c["count"]
    return correct, partial, sum(max(len(boxes) - asked.get(name, 0), 0) for name, boxes in scene.rows.items())


def random_detections(rng, row, detection):
    """Something like what a detector makes of a picture that nearly fulfils the prompt: `detection(name, box, color, confidence)`."""
    found, places = [], {}
    corner = rng.uniform(100, 400, 2)
    for place, clause in enumerate(row["include"]):
        if "position" in clause and rng.random() < 0.8:
            axis, sign = DIRECTIONS[clause["position"][0]]
            corner = places[clause["position"][1]].copy()
            corner[axis] += sign * rng.uniform(0, 300)
            corner[1 - axis] += rng.normal(0, 60)
        else:
            corner = rng.uniform(100, 400, 2)
        places[place] = corner
        number = max(0, clause["count"] + int(rng.choice([0, 0, 0, 0, -1, 1, 16])))
        for _ in range(number):
            right = rng.random() < 0.8
            color = clause.get("color") if right else str(rng.choice(COLORS))
            found.append((clause["class"], corner + rng.normal(0, 8, 2), color))
    for name in rng.choice(CLASSES, rng.integers(0, 3)):
        found.append((str(name), rng.uniform(0, 500, 2), None))
    if rng.random() < 0.5:  # whole pixels, and objects of one size, meet the limits of the rules exactly
        found = [(name, np.round(corner, -1), color) for name, corner, color in found]
        sizes = itertools.repeat(np.array([40.0, 20.0]))
    else:
        sizes = (rng.uniform(1, 120, 2) for _ in itertools.count())
    low = 0.85 if row["tag"] == "counting" else 0.25
    rng.shuffle(found)
    return [
        detection(name, (*map(float, corner), *map(float, corner + size)), color, float(rng.uniform(low, 1)))
        for (name, corner, color), size in zip(found, sizes)
    ]
