"""Prompts in GenEval's format: the official ones are known, and none that is written says the same."""

import json
from collections import Counter

import pytest
from geneval_reference import official_rows

from unipic2_jax.core.assets import ASSETS
from unipic2_jax.data.prompts import JSONLSource, make_source
from unipic2_jax.rewards.geneval import prompts as geneval_prompts
from unipic2_jax.rewards.geneval.classes import CLASSES, class_name
from unipic2_jax.rewards.geneval.prompts import (
    DIMENSIONS,
    canonical,
    digest,
    digests,
    generate,
    metadata,
    official,
    plural,
    read_digests,
    with_article,
    write_prompts,
)
from unipic2_jax.rewards.geneval.rules import COLORS, TAGS

COUNTS = {"two_object": 1400, "counting": 160, "colors": 640, "position": 1400, "color_attr": 1400}


@pytest.fixture(scope="module")
def generated():
    return generate(COUNTS, seed=0)


def swapped(row):
    """The same prompt with its two objects exchanged, colours with them: it means another picture only for a position."""
    first, second = row["include"]
    if "position" in second:
        relation = second["position"][0]
        return {
            "include": [{"class": second["class"], "count": 1}, {**first, "position": [relation, 0]}],
            "prompt": "",
        }
    return {"include": [second, first], "prompt": ""}


def mirrored(row):
    """'a left of b' as 'b right of a'."""
    other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    turned = swapped(row)
    turned["include"][1]["position"] = [other[row["include"][1]["position"][0]], 0]
    return turned


def test_the_shipped_prompts_are_the_official_ones():
    rows = list(official_rows())
    assert len(rows) == 553 and Counter(row["tag"] for row in rows)["single_object"] == 80
    shipped = (ASSETS / "geneval/evaluation_metadata.jsonl").read_text()
    assert [json.loads(line) for line in shipped.splitlines()] == rows
    assert frozenset(digests(rows)) == official()


def test_they_are_a_source_of_prompts():
    source = make_source({"kind": "geneval"}, seed=1000)
    whole, part = source.batch(0, 553), source.batch(0, 60)
    assert {record.prompt for record in whole} == {row["prompt"] for row in official_rows()}
    assert [record.prompt for record in part] == [record.prompt for record in whole[:60]]
    assert {record.metadata["tag"] for record in part} == set(TAGS)


def test_official_prompts_are_recognised_in_any_order():
    for row in official_rows():
        if len(row["include"]) == 2:
            assert digest(swapped(row)) in official()
        if row["tag"] == "position":
            assert digest(mirrored(row)) in official() and digest(swapped(mirrored(row))) in official()


def test_none_of_five_thousand_collides(generated):
    assert len(generated) == 5000 and Counter(row["tag"] for row in generated) == COUNTS
    assert len({row["prompt"] for row in generated}) == 5000
    barred = {canonical(row) for row in official_rows()}
    texts = {row["prompt"] for row in official_rows()}
    for row in generated:
        twins = [row] + ([swapped(row)] if len(row["include"]) == 2 else [])
        twins += [mirrored(row)] if row["tag"] == "position" else []
        assert not barred & {canonical(twin) for twin in twins} and row["prompt"] not in texts


def test_every_official_prompt_follows_the_templates():
    """Rebuilt from what their metadata says, they are equal to the last letter."""
    place = lambda names, name: names.index(name)
    for row in official_rows():
        first, second = (*row["include"], None)[:2]
        people = [name for name in CLASSES if name != "person"]
        after = lambda a, b: b - (b > a)  # the second number leaves the first thing out
        if row["tag"] == "single_object":
            numbers = (place(CLASSES, first["class"]),)
        elif row["tag"] == "counting":
            numbers = (place(CLASSES, first["class"]), first["count"] - 2)
        elif row["tag"] == "colors":
            numbers = (place(people, first["class"]), place(COLORS, first["color"]))
        elif row["tag"] == "color_attr":
            a, b = place(people, first["class"]), place(people, second["class"])
            c, d = place(COLORS, first["color"]), place(COLORS, second["color"])
            numbers = (a, after(a, b), c, after(c, d))
        else:
            objects = (second, first) if row["tag"] == "position" else (first, second)
            a, b = (place(CLASSES, thing["class"]) for thing in objects)
            numbers = (a, after(a, b))
            if row["tag"] == "position":
                numbers += (place(geneval_prompts.RELATIONS, second["position"][0]),)
        assert json.dumps(metadata(row["tag"], numbers)) == json.dumps(row)


def test_articles_and_plurals():
    assert [with_article(words) for words in ("apple", "umbrella", "bus", "orange cup")] == [
        "an apple",
        "an umbrella",
        "a bus",
        "an orange cup",
    ]
    assert [plural(name) for name in ("bus", "skis", "knife", "person")] == ["buses", "skises", "knifes", "persons"]


def test_numbers_cover_every_tag_without_repetition():
    for tag, shape in DIMENSIONS.items():
        last = metadata(tag, tuple(size - 1 for size in shape))
        names = [clause["class"] for clause in last["include"]]
        assert last["tag"] == tag and len(set(names)) == len(names)
        with pytest.raises(IndexError):
            metadata(tag, (shape[0] + 1,) * len(shape))
    assert set(DIMENSIONS) == set(TAGS)
    with pytest.raises(ValueError, match="not a GenEval tag"):
        metadata("sizes", (0,))


def test_the_seed_decides_and_tags_are_independent(generated):
    assert generate(COUNTS, seed=0) == generated != generate(COUNTS, seed=1)
    alone = {row["prompt"] for row in generate({"position": 300}, seed=0)}
    assert alone < {row["prompt"] for row in generated if row["tag"] == "position"}


def test_what_there_is_and_no_more():
    left = 240 - 80  # no two official counting prompts are alike
    assert len(generate({"counting": left})) == left
    with pytest.raises(ValueError, match="has only 160 prompts"):
        generate({"counting": left + 1})
    with pytest.raises(ValueError, match="'single_object' has only 0 prompts"):
        generate({"single_object": 1})
    allowed = generate({"single_object": 80}, allow_official=["single_object"])
    assert {row["include"][0]["class"] for row in allowed} == set(CLASSES)
    with pytest.raises(ValueError, match="'size' is not a GenEval tag"):
        generate({"size": 1})
    with pytest.raises(ValueError, match="use 0 or more"):
        generate({"colors": -1})


def test_written_prompts_are_read_by_the_source_and_can_be_excluded(tmp_path, generated):
    path = tmp_path / "new" / "prompts.jsonl"
    write_prompts(path, generated[:300])
    records = JSONLSource(str(path), shuffle=False, task="t2i").batch(0, 300)
    assert [record.prompt for record in records] == [row["prompt"] for row in generated[:300]]
    assert [record.metadata for record in records] == [{"index": i, **row} for i, row in enumerate(generated[:300])]
    barred = read_digests(path)
    others = generate({"colors": 500}, seed=0, exclude=barred)
    assert not barred & set(digests(others)) and barred & set(digests(generate({"colors": 500}, seed=0)))
    path.write_text('{"prompt": "a cat"}\n')
    with pytest.raises(ValueError, match=r"Line 1 of .* has no 'include'"):
        read_digests(path)
    path.write_text(json.dumps(generated[0]) + '\n{"prompt": "a cat", "include": [{"class": "cat"}]}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*: Clause 0 of 'a cat' has no 'class' or no 'count'"):
        read_digests(path)


def test_names_that_detectors_use():
    assert len(CLASSES) == len(set(CLASSES)) == 80 and CLASSES[0] == "person"
    coco = ["person", "mouse", "remote", "keyboard", "sofa", "aeroplane", "zebra", "lamp"]
    assert [class_name(label) for label in coco] == [
        "person",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "couch",
        "airplane",
        "zebra",
        "lamp",
    ]
