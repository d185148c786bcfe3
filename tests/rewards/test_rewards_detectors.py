"""Detectors: a real one on real photographs, the shapes verifier, and what they have in common."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict
from real_parts import efficientdet, photograph

from configs.pdtr import get_config
from unipic2_jax.data.prompts import PromptRecord, make_source
from unipic2_jax.rewards.base import make_reward
from unipic2_jax.rewards.geneval.classes import CLASSES
from unipic2_jax.rewards.geneval.detectors import base
from unipic2_jax.rewards.geneval.detectors.base import Wanted, make_detector
from unipic2_jax.rewards.geneval.detectors.colors import add_colors, crop
from unipic2_jax.rewards.geneval.detectors.mask2former import Mask2FormerDetector
from unipic2_jax.rewards.geneval.detectors.tflite import read_labels
from unipic2_jax.rewards.geneval.rules import COLORS, Detection
from unipic2_jax.rewards.scoring import Scorer, make_entries
from unipic2_jax.shapes.detector import ShapesDetector
from unipic2_jax.shapes.world import Scene, Thing, render

PHOTOGRAPHS = {"chelsea": "cat", "coffee": "cup", "astronaut": "person", "motorcycle": "motorcycle"}


def asking(prompt, *include, tag="single_object", **more):
    return PromptRecord(prompt, metadata={"tag": tag, "include": list(include), **more})


def one(name, **more):
    return {"class": name, "count": 1, **more}


@pytest.fixture(scope="module")
def photographs():
    return {name: photograph(name) for name in PHOTOGRAPHS}


def test_a_real_detector_sees_what_is_in_real_photographs(photographs):
    detector = make_detector({"kind": "tflite", "model": str(efficientdet())})
    images = list(photographs.values())
    found = detector.detect(images, [Wanted(frozenset(), threshold=0.5)] * len(images))
    for image, detections, name in zip(images, found, PHOTOGRAPHS.values()):
        best = max(detections, key=lambda detection: detection.confidence)
        x0, y0, x1, y1 = best.box
        assert best.name == name and 0.7 < best.confidence <= 1 and best.mask is None and best.color is None
        assert 0 <= x0 < x1 <= image.shape[1] and 0 <= y0 < y1 <= image.shape[0]
    # The cup stands in the middle, where the picture (400 x 600 pixels) has it.
    (cup,) = [detection.box for detection in found[1] if detection.name == "cup"]
    assert np.allclose(cup, (160, 25, 420, 320), atol=30)
    quiet = detector.detect(images[:1], [Wanted(frozenset(), threshold=0.99)])
    assert quiet == [[]], "less confident than was asked for"


def test_geneval_with_a_real_detector(photographs):
    """'a photo of a cat' is right for the cat and wrong for the coffee, and so on for all pairs; positions and counts."""
    options = {"detector": {"kind": "tflite", "model": str(efficientdet())}, "counting_threshold": 0.5}
    reward = make_reward("geneval", **options)
    names, images = list(PHOTOGRAPHS.values()), list(photographs.values())
    for name in names:
        scores = reward.score(images, [asking(f"a photo of a {name}", one(name))] * len(images))
        assert (scores.values == [float(name == other) for other in names]).all()
        assert (scores.details["correct"] == scores.values).all()

    coffee, cat = photographs["coffee"], photographs["chelsea"]
    two = np.concatenate([coffee, coffee])  # one above the other, so that the detector need not squeeze them
    count = lambda number: asking(
        f"a photo of {number} cups",
        {"class": "cup", "count": number},
        tag="counting",
        exclude=[{"class": "cup", "count": number + 1}],
    )
    scores = reward.score([coffee, two, two, coffee], [count(1), count(2), count(1), count(2)])
    assert scores.details["correct"].tolist() == [1, 1, 0, 0] and scores.values.tolist() == [1, 1, 0, 0.5]

    stacked = np.concatenate([np.pad(cat, ((0, 0), (74, 75), (0, 0)), mode="edge"), coffee])
    place = lambda relation: asking("", one("cat"), one("cup", position=[relation, 0]), tag="position")
    scores = reward.score([stacked] * 3, [place("below"), place("above"), place("left of")])
    assert scores.details["correct"].tolist() == [1, 0, 0] and scores.values.tolist() == pytest.approx(
        [1, 2 / 3, 2 / 3]
    )

    exact = make_reward("geneval", exact=True, strict_weight=1.0, **options)
    scores = exact.score([cat, coffee], [asking("", one("cat")), asking("", one("cup"))])
    assert scores.values.tolist() == [1, 0] and scores.details["extras"][1] >= 1, "the cup stands on a table"


def test_threads_share_one_interpreter(photographs):
    entries = make_entries(
        {
            "geneval": {
                "detector": {"kind": "tflite", "model": str(efficientdet(0))},
                "batch_size": 1,
                "concurrency": 4,
            }
        }
    )
    images = list(photographs.values()) * 2
    records = [asking(f"a photo of a {name}", one(name)) for name in PHOTOGRAPHS.values()] * 2
    assert (Scorer(entries).score(images, records).values["geneval"] == 1).all()


def test_a_boxes_only_detector_refuses_colours(photographs):
    reward = make_reward("geneval", detector={"kind": "tflite", "model": str(efficientdet(0))})
    red, lamp = asking("a red cup", one("cup", color="red")), asking("a lamp", one("lamp"))
    for refuse in (
        lambda record: reward.score([photographs["coffee"]], [record]),
        lambda record: reward.check([record]),
    ):
        with pytest.raises(ValueError, match="cannot tell; name a CLIP"):
            refuse(red)
        with pytest.raises(ValueError, match="knows no 'lamp'"):
            refuse(lamp)
    reward.check([asking("a cup", one("cup"))])


def test_labels_from_a_file(tmp_path, photographs):
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(f"thing {number}" for number in range(90)))
    detector = make_detector({"kind": "tflite", "model": str(efficientdet(0)), "labels": str(file)})
    (found,) = detector.detect([photographs["chelsea"]], [Wanted(frozenset({"thing 16"}), threshold=0.5)])
    assert [detection.name for detection in found] == ["thing 16"]


def test_lines_of_a_file_of_labels_end_as_files_say(tmp_path):
    (tmp_path / "labels.txt").write_bytes("\ufeffcat\r\n\r\nsofa\x85\r\n".encode())
    assert read_labels("none", str(tmp_path / "labels.txt")) == ["cat", "", "couch"]
    (tmp_path / "labels.txt").write_bytes("cat\nhot\u2028dog".encode())
    assert read_labels("none", str(tmp_path / "labels.txt")) == ["cat", "hot\u2028dog"]


def test_a_tflite_file_has_to_be_one(tmp_path):
    pytest.importorskip("ai_edge_litert", reason="the detector 'tflite' needs ai-edge-litert")
    wanted = [Wanted(frozenset())]
    with pytest.raises(FileNotFoundError, match=r"none.tflite does not exist"):
        make_detector({"kind": "tflite", "model": str(tmp_path / "none.tflite")})
    file, labels = tmp_path / "a.tflite", tmp_path / "labels.txt"
    file.write_bytes(b"nothing")
    labels.write_text("cat\n")
    with pytest.raises(ValueError, match="does not hold the names"):
        make_detector({"kind": "tflite", "model": str(file)}).detect([np.zeros((8, 8, 3), np.uint8)], wanted)
    bad = make_detector({"kind": "tflite", "model": str(file), "labels": str(labels)})
    with pytest.raises(ValueError, match="is no TFLite model"):
        bad.detect([np.zeros((8, 8, 3), np.uint8)], wanted)
    with pytest.raises(ValueError, match="threads=0"):
        make_detector({"kind": "tflite", "model": str(file), "threads": 0})


def test_the_shapes_verifier_behind_the_same_interface_gives_the_numbers_of_its_own_reward():
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    records = make_source({"kind": "shapes", "task": "t2i", "tags": tags}, 3).batch(0, 120)
    records = [record for record in records if "background" not in record.metadata]
    rng = np.random.default_rng(0)
    colors = ("red", "green", "blue")
    images = []
    for record in records:  # what is asked for, in part
        cells = rng.permutation(9)
        wanted = [clause for clause in record.metadata["include"] for _ in range(clause["count"]) if rng.random() < 0.9]
        things = [
            Thing(int(cell), clause["class"], clause.get("color", str(rng.choice(colors))), clause.get("size", "small"))
            for cell, clause in zip(cells, wanted)
        ]
        if rng.random() < 0.2:
            things.append(Thing(int(cells[-1]), "cross", "red", "large"))
        images.append(render(Scene("white", tuple(things))))
    own = make_reward("shapes_t2i").score(images, records)
    ours = make_reward("geneval", detector="shapes", exact=True, strict_weight=0.5).score(images, records)
    assert len(records) > 30 and 0.1 < own.details["correct"].mean() < 0.9
    assert (own.values == ours.values).all() and own.details.keys() == ours.details.keys()
    assert all((own.details[name] == ours.details[name]).all() for name in own.details)


def test_shapes_detector_refuses_what_is_not_of_its_world():
    with pytest.raises(ValueError, match="knows no 'cat'"):
        make_reward("geneval", detector="shapes").score(
            [render(Scene("white", ()))], [asking("a photo of a cat", one("cat"))]
        )


def test_prompts_that_cannot_be_scored_are_found_before_a_run():
    cat, plain = asking("a photo of a cat", one("cat")), PromptRecord("a cat on a mat")
    for reward in (make_reward("geneval", detector="shapes"), make_reward("shapes_t2i")):
        reward.check(make_source({"kind": "shapes"}, 0).batch(0, 60))
        with pytest.raises(ValueError, match="knows no 'cat'"):
            reward.check([cat])
        with pytest.raises(ValueError, match="'a cat on a mat' says nothing of what to find"):
            reward.check([plain])
    edits = make_reward("shapes_edit")
    edits.check(make_source({"kind": "shapes", "task": "edit"}, 0).batch(0, 60))
    for metadata in ({}, {"source": 5}, {"source": {"background": "white", "things": []}, "type": "fly"}):
        with pytest.raises(ValueError, match="'make it blue' has as metadata is no edit of the shapes world"):
            edits.check([PromptRecord("make it blue", metadata=metadata)])


def test_crops_are_grey_outside_of_the_mask_and_stay_inside_of_the_picture():
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.array([[True, False], [True, True]])
    masked = crop(image, Detection("cup", (2, 1, 4, 3), mask=mask))
    assert (masked[mask] == image[1:3, 2:4][mask]).all() and (masked[~mask] == 0x99).all()
    assert (crop(image, Detection("cup", (1.4, 0, 7.6, 5.5))) == image[0:6, 1:8]).all()
    assert crop(image, Detection("cup", (7.9, 5.9, 8, 6))).shape == (1, 1, 3)


def test_only_colours_that_are_asked_for_are_classified():
    image = np.full((20, 20, 3), 255, np.uint8)
    image[:10] = (255, 0, 0)
    asked = []

    def classifier(crops, names, batch_size):
        asked.extend(names)
        return ["red" if (pixels == (255, 0, 0)).all() else "white" for pixels in crops]

    found = [
        Detection("cup", (0, 0, 5, 5)),
        Detection("dog", (0, 0, 5, 5)),
        Detection("cup", (0, 12, 5, 18), confidence=0.4),
    ]
    wanted = [Wanted(frozenset({"cup", "dog"}), frozenset({"cup"})), Wanted(frozenset({"cup"}))]
    first, second = add_colors([image, image], [found, found], wanted, classifier, 4)
    assert [detection.color for detection in first] == ["red", None, "white"] and asked == ["cup", "cup"]
    assert second == found and {"red", "white"} < set(COLORS)


def test_loading_happens_once_for_all_threads():
    made = []
    load = base.once(lambda name: made.append(name) or object())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(load, ["a"] * 16 + ["b"] * 16))
    assert sorted(made) == ["a", "b"] and len(set(map(id, results))) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"detector": "yolo"}, "detector 'yolo' does not exist"),
        ({"detector": {"kind": "shapes", "device": "cpu"}}, "does not take these options"),
        ({"detector": "shapes", "strict_weight": 2}, "strict_weight is 2"),
        ({"detector": "shapes", "threshold": 3}, "threshold is 3"),
        ({"detector": "shapes", "softness": 3}, "does not take these options"),
    ],
)
def test_mistakes_in_the_configuration_get_one_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        make_reward("geneval", **options)


def test_a_recipe_describes_the_detector():
    """As `configs/pdtr.py` has it; a flag changes one field of it."""
    config = ConfigDict({"geneval": {"weight": 1.0, "detector": {"kind": "mask2former", "device": "tpu"}}})
    config.geneval.detector.kind = "shapes"
    del config.geneval.detector.device
    (entry,) = make_entries(config).values()
    assert isinstance(entry.reward.detector, ShapesDetector) and entry.weight == 1
    recipe = get_config().stages.t2i.rewards.geneval.detector.to_dict()
    assert recipe.pop("kind") == "mask2former" and recipe == {
        field.name: field.default for field in dataclasses.fields(Mask2FormerDetector) if field.name in recipe
    }


def test_prompts_without_metadata_get_one_sentence():
    with pytest.raises(ValueError, match="'a cat' says nothing of what to find"):
        make_reward("geneval", detector="shapes").score([render(Scene("white", ()))], [PromptRecord("a cat")])
    assert len(CLASSES) == 80
