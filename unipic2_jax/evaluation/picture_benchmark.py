"""Benchmarks that ask for pictures of one size: prompts or edits from a source, made by the sampler and marked by rewards.

The works of an item lie as GenEval's: `00012/metadata.jsonl` and `00012/samples/00000.png`, ... A benchmark with another layout says where
in `paths`, and in `save` what else lies there or how several samples become one file; `load` takes it apart again.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from unipic2_jax.core.files import write_bytes, write_text
from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.evaluation import marks as told
from unipic2_jax.evaluation.benchmark import Benchmark, Item, Mark, Report, Subject, digest
from unipic2_jax.evaluation.evaluator import check_evaluation, evaluation_fields, held_out, read_evaluation
from unipic2_jax.evaluation.maker import PictureMaker
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.parallel.processes import is_main
from unipic2_jax.pictures.decode import read_image
from unipic2_jax.rewards.scoring import CALL_FIELDS, Scorer, make_entries

# Fields of an evaluation that decide nothing about its pictures.
FREE = ("rewards", "batch_size", "pictures")
# Fields that came later.
LATER = ("solver", "guidance_interval")
# Pictures that are marked between two writings of what was found.
MARKED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class PictureBenchmark(Benchmark):
    """A subclass has `evaluations`; what follows it is to be overridden where the benchmark is unlike others.

    Attributes:
      solver: of the sampling: euler, dpm2 or unipc.
      guidance_interval: LOW,HIGH: guidance between these noise levels alone; empty: everywhere.
    """

    solver: str = "euler"
    guidance_interval: str = ""

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Part -> fields of `evaluator.evaluation_fields`, as a stage of training takes them too: prompts, sampler, rewards, size."""
        raise NotImplementedError

    def paths(self, item: Item) -> tuple[str, ...]:
        """The files that hold its pictures, relative to the works."""
        return tuple(f"{item.key}/samples/{sample:05}.png" for sample in range(self._configs[item.part].samples))

    def save(self, works: Path, item: Item, pictures: Sequence[np.ndarray]) -> None:
        """Writes the samples [H, W, 3] of an item, whole or not at all."""
        for path, picture in zip(self.paths(item), pictures, strict=True):
            write_picture(works / path, picture)
        metadata = {"prompt": item.task.prompt, **item.task.metadata}
        write_text(works / item.key / "metadata.jsonl", json.dumps(metadata, default=str) + "\n")

    def load(self, works: Path, item: Item) -> list[np.ndarray]:
        """The samples of an item, uint8 [H, W, 3] each.

        Raises:
          OSError, ValueError: when one is missing or damaged, or was made for another prompt.
        """
        metadata = works / item.key / "metadata.jsonl"
        if metadata.is_file() and json.loads(metadata.read_text(encoding="utf-8")).get("prompt") != item.task.prompt:
            raise ValueError(f"{metadata} is about another prompt; give the works of these options, or make them anew.")
        return [np.asarray(read_image(works / path)) for path in self.paths(item)]

    def text(self, scores: Mapping[str, Any]) -> str:
        """The numbers for the terminal: by default all means that are over no tag alone."""
        lines = [
            [part, *(f"  {name:30}{value:10.3f}" for name, value in _overall(means))] for part, means in scores.items()
        ]
        return "\n".join(line for part in lines for line in part)

    def headline(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """The means of all rewards."""
        names = [f"{part}/{reward}" for part, config in self._configs.items() for reward in config.rewards]
        return {name: scores[name.partition("/")[0]][name] for name in names}

    def files(self, items: Sequence[Item], marks: Sequence[Mark]) -> dict[str, str]:
        """See `Report.files`."""
        del items, marks
        return {}

    # ---- What a benchmark of pictures need not say.

    def _fields(self) -> dict[str, dict[str, Any]]:
        """`evaluations`, with the sampler's options that all these benchmarks have."""
        interval = tuple(map(_as_number, filter(None, self.guidance_interval.split(","))))
        own = {"solver": self.solver, "guidance_interval": interval or None}
        return {part: {**own, **fields} for part, fields in self.evaluations().items()}

    @functools.cached_property
    def _configs(self) -> dict[str, ConfigDict]:
        return {part: read_evaluation(part, fields) for part, fields in self._fields().items()}

    @functools.cached_property
    def _records(self) -> dict[str, list[PromptRecord]]:
        return {part: held_out(config) for part, config in self._configs.items()}

    def items(self) -> list[Item]:
        key = (
            (lambda part, number: f"{part}/{number:05}")
            if len(self._configs) > 1
            else (lambda _, number: f"{number:05}")
        )
        return [
            Item(key(part, number), str(record.metadata.get("tag", "")), record, part, number)
            for part, records in self._records.items()
            for number, record in enumerate(records)
        ]

    def check(self, subject: Subject | None) -> None:
        for part, fields in self._fields().items():
            check_evaluation(part, fields)

    def settings(self) -> dict[str, Any]:
        plain = evaluation_fields().to_dict()
        # Not told where they are as they were before there were others: works of then go on.
        said = lambda name, value: name not in FREE and (name not in LATER or value != plain[name])
        return {
            part: {name: value for name, value in config.to_dict().items() if said(name, value)}
            for part, config in self._configs.items()
        }

    def made(self, works: Path, items: Sequence[Item]) -> set[str]:
        return {item.key for item in items if all((works / path).is_file() for path in self.paths(item))}

    def make(self, subject: Subject, works: Path, items: Sequence[Item]) -> None:
        bundle, mesh = subject.bundle, make_mesh()
        for part, config in self._configs.items():
            wanted = {item.number: item for item in items if item.part == part}
            if not wanted:
                continue
            maker = PictureMaker(config, self._records[part], bundle, mesh)
            numbers = [number * config.samples + sample for number in wanted for sample in range(config.samples)]
            waiting: dict[int, list[np.ndarray]] = {}
            with tqdm(total=len(numbers), desc=f"making {part}", unit="picture", disable=None) as bar:
                for made, pictures in maker.make(bundle.params, wanted=numbers):
                    for number, picture in zip(made // config.samples, pictures):
                        waiting.setdefault(number, []).append(picture)
                        if len(waiting[number]) == config.samples and is_main():
                            self.save(works, wanted[number], waiting.pop(number))
                    bar.update(len(made))

    def digests(self, works: Path, items: Sequence[Item]) -> dict[str, str]:
        content = lambda item: [(works / path).read_bytes() for path in self.paths(item)]
        asked = lambda item: [item.task.prompt, item.task.metadata]
        return {item.key: digest(self._marker[item.part], asked(item), *content(item)) for item in items}

    @functools.cached_property
    def _scorers(self) -> dict[str, Scorer]:
        return {part: Scorer(make_entries(config.rewards, make_mesh())) for part, config in self._configs.items()}

    @functools.cached_property
    def _marker(self) -> dict[str, Any]:
        """Part -> who marks it: the rewards' options that decide their scores."""
        markers = {}
        for part, config in self._configs.items():
            options = {name: dict(values) for name, values in config.rewards.to_dict().items()}
            entries = self._scorers[part].entries
            markers[part] = {
                name: entries[name].reward.deciding({k: v for k, v in fields.items() if k not in CALL_FIELDS})
                for name, fields in options.items()
            }
        return markers

    def mark(self, works: Path, items: Sequence[Item]) -> Iterator[list[Mark]]:
        for part, config in self._configs.items():
            of_part = [item for item in items if item.part == part]
            step = max(1, MARKED_AT_ONCE // config.samples)
            for start in tqdm(range(0, len(of_part), step), desc=f"marking {part}", disable=None):
                yield self._marks(works, of_part[start : start + step], part)

    def _marks(self, works: Path, items: Sequence[Item], part: str) -> list[Mark]:
        samples = self._configs[part].samples
        loaded = [self._loaded(works, item) for item in items]
        images = [picture for pictures, _ in loaded for picture in pictures]
        columns, errors = told.columns(self._scorers[part], images, [record for _, record in loaded], make_mesh())
        marks = []
        for place, item in enumerate(items):
            places = range(place * samples, (place + 1) * samples)
            values = {title: [_number(column[i]) for i in places] for title, column in columns.items()}
            marks.append(
                Mark(item.key, values=values, errors=[sentence for i in places for sentence in errors.get(i, ())])
            )
        return marks

    def _loaded(self, works: Path, item: Item) -> tuple[list[np.ndarray], PromptRecord]:
        """The samples and the record of an item; one of whose pictures is damaged is not scored, and its record says why."""
        try:
            return self.load(works, item), item.task
        except (OSError, ValueError) as error:
            empty = [np.zeros((1, 1, 3), np.uint8)] * self._configs[item.part].samples
            return empty, dataclasses.replace(item.task, error=str(error))

    def report(self, works: Path, items: Sequence[Item], marks: Sequence[Mark]) -> Report:
        scores, pictures = {}, {}
        for part, config in self._configs.items():
            of_part = [(item, mark) for item, mark in zip(items, marks, strict=True) if item.part == part]
            records = [item.task for item, _ in of_part]
            tables = _tables([mark for _, mark in of_part], config.samples)
            scores[part] = {
                f"{part}/{title}": value
                for title, value in {
                    **told.means(tables, records),
                    **told.failures(tables, records, self._scorers[part].entries),
                }.items()
            }
            shown = [self._loaded(works, item) for item, mark in of_part[: config.pictures] if mark.values]
            if shown := [(images, record) for images, record in shown if not record.error]:
                pictures[f"{part}.png"] = told.sheet(*zip(*shown))
        return Report(scores, self.text(scores), pictures, self.files(items, marks))


def write_picture(path: Path, picture: np.ndarray) -> None:
    """A uint8 [H, W, 3] as PNG, whole or not at all; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    write_bytes(path, content.getvalue())


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"guidance_interval holds {text!r}; write LOW,HIGH, as in 0.2,0.9.") from None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _tables(marks: Sequence[Mark], samples: int) -> dict[str, np.ndarray]:
    """Title -> [items, samples], NaN where a mark is missing."""
    titles = dict.fromkeys(title for mark in marks for title in mark.values)
    return {
        title: np.array([mark.values.get(title, [None] * samples) for mark in marks], np.float64) for title in titles
    }


def _overall(means: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name.partition("/")[2], value) for name, value in means.items() if name.count("/") == 1]
