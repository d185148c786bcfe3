"""The seam for benchmarks: what is asked of a model, where its works lie, how they are marked, and what is said about the marks.

    OUT/works/        what the model made, laid out as the benchmark's own scorer reads it
    OUT/made.json     by which model and how it was made; works of another one are moved aside, never mixed with it
    OUT/marks.jsonl   a line for each item that was marked: its marks, and why those that it lacks are missing
    OUT/scores.json   the report's numbers; beside it the report's pictures, and files as the benchmark's own scorer writes them

Everything is written when an item is done, so a benchmark that was interrupted goes on where it was, and an item whose marking failed is
asked about again. Making and marking can run apart, on other machines: marking needs a folder, whoever filled it, and no model.

A benchmark is a frozen dataclass that registers itself; its fields are its options, and flags of `launch.evaluate` as well. What it has
to say is above the line in `Benchmark`. `picture_benchmark` and `question_benchmark` say most of it for the two usual kinds, and
docs/extending/benchmark.md walks through one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unipic2_jax.core.errors import nearest
from unipic2_jax.core.fields import check_fields, hints
from unipic2_jax.core.files import append_rows, read_rows, write_text
from unipic2_jax.core.registry import Registry
from unipic2_jax.models.bundle import Bundle, load_bundle
from unipic2_jax.parallel.processes import is_main, wait_for_all
from unipic2_jax.pipelines import adapters
from unipic2_jax.pipelines.chat import ChatModel
from unipic2_jax.weights.precision import inference_dtype

# Names for --suite; a class is a `Benchmark`. A variant has a name of its own behind a colon: 'geneval:rewritten'.
BENCHMARKS = Registry("benchmark")


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is measured, read when it is first asked for.

    Attributes:
      source: folder or hub id.
      loras, dtype: as of `pipelines.load`.
    """

    source: str
    loras: tuple[str, ...] = ()
    dtype: str | None = None

    @functools.cached_property
    def bundle(self) -> Bundle:
        """What draws and edits, its LoRAs merged into it."""
        wanted = adapters.located(self.loras)
        bundle, _ = adapters.load_fused(load_bundle(self.source, inference_dtype(self.dtype)), wanted)
        return bundle

    @functools.cached_property
    def chat(self) -> ChatModel:
        """What answers questions."""
        return ChatModel.load(self.source, self.dtype)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What tells it from another one: the bytes of its folder's files. A hub id stands for itself."""
        return {
            "model": _digest_of(Path(self.source)) or self.source,
            "loras": [[_digest_of(Path(one.source)), one.scale] for one in adapters.located(self.loras)],
            **({} if (dtype := inference_dtype(self.dtype)) == "float32" else {"dtype": dtype}),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One thing that is asked of a model.

    Attributes:
      key: names it in the benchmark for ever, also in the paths of its works: '00012', 't2i/00012'.
      tag: its type; scores are means over types.
      task: what is asked, as a `PromptRecord` or a `Question`.
      part: of the benchmark, where it has several; number: its place in that part, which its seeds are made of.
    """

    key: str
    tag: str
    task: Any
    part: str = ""
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Mark:
    """What was found about the works of one item.

    Attributes:
      key: of the item.
      of: digest of what was marked and of who marked it; another one is marked anew.
      values: name -> one number for each sample; None where there is none, which is never a 0.
      errors: why some are missing; the next run asks again.
      notes: what else a report may show, as JSON: a judge's words, what a detector found.
    """

    key: str
    of: str = ""
    values: Mapping[str, Sequence[float | None]] = dataclasses.field(default_factory=dict)
    errors: Sequence[str] = ()
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """What is said about the marks.

    Attributes:
      scores: for scores.json, with which another run can be compared.
      text: for the terminal.
      pictures: file name -> contact sheet or plot.
      files: file name -> text, as the benchmark's own scorer writes its results.
      failed: a sentence for each item that lacks a mark. Scores stand over the others.
    """

    scores: Mapping[str, Any]
    text: str
    pictures: Mapping[str, Image.Image] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    failed: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What all benchmarks are. Subclasses are frozen dataclasses too.

    Attributes:
      limit: so many items, evenly over the tags, for a quick look; 0: all. What is made for some is kept when all are asked for.
    """

    limit: int = 0

    def __post_init__(self) -> None:
        check_fields(hints(type(self)), {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), min(1, field.default) if type(field.default) is int else None
            if low is not None and value < low:
                raise ValueError(f"{field.name} is {value}; use {low} or more.")

    def items(self) -> Sequence[Item]:
        """All of them, always in the same order."""
        raise NotImplementedError

    def check(self, subject: Subject | None) -> None:
        """Says what is missing, in one sentence, before anything runs: a file, an option, a model that can do this (None: none is
        used).

        Raises:
          ValueError, FileNotFoundError: that sentence.
        """
        del subject

    def settings(self) -> Mapping[str, Any]:
        """What decides the works beside the model, as JSON. Works with other settings are not gone on with."""
        return {}

    def made(self, works: Path, items: Sequence[Item]) -> set[str]:
        """Keys of the items all of whose works are there."""
        raise NotImplementedError

    def make(self, subject: Subject, works: Path, items: Sequence[Item]) -> None:
        """Makes what is asked for and puts it into `works`, each item as soon as it is done."""
        raise NotImplementedError

    def digests(self, works: Path, items: Sequence[Item]) -> dict[str, str]:
        """Key -> `Mark.of`, of items that are made."""
        raise NotImplementedError

    def mark(self, works: Path, items: Sequence[Item]) -> Iterator[list[Mark]]:
        """Marks of items that are made, some at a time; `Mark.of` is filled in by who asks."""
        raise NotImplementedError

    def report(self, works: Path, items: Sequence[Item], marks: Sequence[Mark]) -> Report:
        """The report about the items and their marks, which come in the same order. Whoever asks fills in `Report.failed`."""
        raise NotImplementedError

    def headline(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """The few numbers of a `Report.scores` that a model must not lose: name -> higher is better."""
        raise NotImplementedError

    def gates(self, scores: Mapping[str, Any]) -> list[str]:
        """A sentence for each number that lies where it must not lie."""
        del scores
        return []

    # ---- What a benchmark need not say.

    def chosen(self) -> list[Item]:
        """The items that are asked for."""
        items = list(self.items())
        if not self.limit:
            return items
        return [items[place] for place in even_sample([f"{item.part}/{item.tag}" for item in items], self.limit)]

    def generate(self, subject: Subject, works: Path) -> int:
        """Makes what is missing.

        Returns:
          How many items that were.
        """
        items = self.chosen()
        made = self.made(works, items)
        missing = [item for item in items if item.key not in made]
        wait_for_all("what is missing was looked up")
        if missing:
            self.make(subject, works, missing)
        wait_for_all("all works are made")
        return len(missing)

    def score(self, works: Path, file: Path) -> list[Mark]:
        """Marks what has no mark yet, which is added to `file`, and returns all marks in the order of `chosen`.

        Raises:
          ValueError: when nothing of this benchmark is there.
        """
        items = self.chosen()
        made = self.made(works, items)
        if not made:
            raise ValueError(
                f"{works} holds none of the {len(items)} works that are asked for; name the folder with them."
            )
        digests = self.digests(works, [item for item in items if item.key in made])
        known = {row["key"]: Mark(**row) for row in read_rows(file)}
        marks = {key: mark for key, mark in known.items() if mark.of == digests.get(key) and not mark.errors}
        unmarked = [item for item in items if item.key in made and item.key not in marks]
        for batch in self.mark(works, unmarked) if unmarked else ():
            fresh = [dataclasses.replace(mark, of=digests[mark.key]) for mark in batch]
            marks |= {mark.key: mark for mark in fresh}
            if is_main():
                append_rows(file, map(dataclasses.asdict, fresh))
        return [marks.get(item.key) or Mark(item.key, errors=("nothing was made for it",)) for item in items]

    def reported(self, works: Path, marks: Sequence[Mark]) -> Report:
        """The report, and which items it does not stand for."""
        sentences = [f"{mark.key}: {'; '.join(dict.fromkeys(mark.errors))}" for mark in marks if mark.errors]
        return dataclasses.replace(self.report(works, self.chosen(), marks), failed=sentences)

    def missed(self, report: Report, baseline: Mapping[str, Any] | None = None) -> list[str]:
        """A sentence for each of its gates that a report misses; with the scores of another run these are to be no worse than its."""
        missed = [f"{len(report.failed)} items have no mark."] if report.failed else []
        if baseline is None:
            return missed + self.gates(report.scores)
        before, now = self.headline(baseline), self.headline(report.scores)
        below = [name for name in now if now[name] < before[name]]
        return missed + [f"{name} is {now[name]:.3f}, below the baseline's {before[name]:.3f}." for name in below]

    def read_baseline(self, path: str | os.PathLike) -> dict[str, Any]:
        """The scores.json of another run.

        Raises:
          FileNotFoundError, ValueError: when it holds no scores of this benchmark.
        """
        try:
            scores = json.loads(Path(path).read_text(encoding="utf-8"))
            self.headline(scores)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} holds no scores of this benchmark; give the scores.json that --out of another model wrote."
            ) from error
        return scores


class Option(NamedTuple):
    """A field of a benchmark: its type, its default, and the first line of what its class says about it."""

    type: Any
    default: Any
    about: str


def options_of(name: str) -> dict[str, Option]:
    """The options of a benchmark by name.

    Raises:
      ValueError: for an unknown benchmark, with the nearest name.
    """
    cls = BENCHMARKS.find(name)
    options, said = {}, "\n".join(one.__doc__ or "" for one in cls.__mro__)
    for field in dataclasses.fields(cls):
        about = re.search(rf"^ *{field.name}: (.+)", said, re.MULTILINE)
        options[field.name] = Option(hints(cls)[field.name], field.default, about[1] if about else "")
    return options


def make_benchmark(name: str, options: Mapping[str, Any] = MappingProxyType({})) -> Benchmark:
    """The benchmark with these options.

    Raises:
      ValueError: for an unknown name or option, with the nearest one.
    """
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(f"The benchmark '{name}' has no option '{option}'{nearest(option, known)}")
    return BENCHMARKS.find(name)(**options)


def run(
    benchmark: Benchmark,
    subject: Subject,
    out: str | os.PathLike | None = None,
    *,
    works: str | os.PathLike | None = None,
    generate: bool = True,
    score: bool = True,
) -> Report | None:
    """Makes, marks and reports what is missing.

    Args:
      out: see the top of this file; None: nothing is kept.
      works: a folder that is there already and only marked, instead of OUT/works.
      generate, score: one of them may be left out.

    Returns:
      The report; None without `score`.
    """
    benchmark.check(subject if generate else None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(works) if works else folder / "works"
        if generate:
            if out:
                _begin(folder, benchmark, subject)
            made.mkdir(exist_ok=True)
            benchmark.generate(subject, made)
        if not score:
            return None
        report = benchmark.reported(made, benchmark.score(made, folder / "marks.jsonl"))
        if out and is_main():
            write_report(report, folder)
        return report


def write_report(report: Report, folder: Path) -> None:
    """scores.json, and what comes with it."""
    write_text(folder / "scores.json", json.dumps(report.scores, indent=2) + "\n")
    for name, text in report.files.items():
        write_text(folder / name, text)
    for name, picture in report.pictures.items():
        picture.save(folder / name)


def _begin(folder: Path, benchmark: Benchmark, subject: Subject) -> None:
    """Makes OUT/works for this model and these settings; what is there of others becomes OUT/works.1 and so on."""
    works, file = folder / "works", folder / "made.json"
    wanted = json.loads(json.dumps({**subject.identity, "settings": benchmark.settings()}))
    if is_main() and works.is_dir() and (not file.is_file() or json.loads(file.read_text()) != wanted):
        number = next(n for n in range(1, 10**6) if not (folder / f"works.{n}").exists())
        works.rename(folder / f"works.{number}")
    if is_main():
        write_text(file, json.dumps(wanted, indent=2) + "\n")
    wait_for_all("the folder is there")


def even_sample(tags: Sequence[str], count: int) -> list[int]:
    """Places of at most `count` entries, the same number of each tag as far as there are so many, spread over its entries; ascending."""
    places: dict[str, list[int]] = {}
    for place, tag in enumerate(tags):
        places.setdefault(tag, []).append(place)
    shares = dict.fromkeys(places, 0)
    for _ in range(min(count, len(tags))):
        # The tag that has given least so far, of those that have more; the first of equals.
        tag = min((tag for tag in places if shares[tag] < len(places[tag])), key=shares.__getitem__)
        shares[tag] += 1
    spread = lambda all_of_tag, share: [all_of_tag[round(i)] for i in np.linspace(0, len(all_of_tag) - 1, share)]
    return sorted(place for tag in places for place in spread(places[tag], shares[tag]))


def digest(*parts: Any) -> str:
    """One digest of bytes and of what JSON can hold."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        hashed.update(len(content).to_bytes(8, "little") + content)
    return hashed.hexdigest()


def _digest_of(path: Path) -> str:
    """The digest of a file, or of all files in a folder with their names; '' where there is none."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    contents = []
    for file in files:
        with open(file, "rb") as content:
            contents.append([str(file.relative_to(path)), hashlib.file_digest(content, "blake2b").hexdigest()])
    return digest(contents) if contents else ""
