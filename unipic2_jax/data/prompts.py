"""What a model is asked to do during reinforcement and evaluation: prompts, with a source image when it is an edit."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm import tqdm

from unipic2_jax.core.addresses import fetched_files, is_address
from unipic2_jax.core.errors import ConfigError
from unipic2_jax.core.registry import Registry
from unipic2_jax.data.readers.fields import parse_json, parse_task
from unipic2_jax.data.text import read_text
from unipic2_jax.pictures.decode import BadRecord, decode
from unipic2_jax.pictures.resize import resized, to_model

# Kinds. A class takes (seed, **options) and is a PromptSource.
SOURCES = Registry("prompt source")

# Stands for a picture that is not needed yet.
UNREAD = np.zeros((1, 1, 3), np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptRecord:
    """One task for the model."""

    prompt: str
    image: np.ndarray | None = None  # uint8 [H, W, 3], what to edit
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # what rewards need to know
    key: str = ""  # samples with equal keys form a group; by default made of prompt and image
    error: str = ""  # the sentence that says why its image could not be read; what is made for it is not scored

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", group_key(self.prompt, self.image))


class PromptSource(Protocol):
    """Where tasks come from. A batch is a function of the seed it was made with and the step, nothing else."""

    def batch(self, step: int, count: int) -> list[PromptRecord]:
        """The tasks of a step. All of a batch have an image, or none has."""
        ...


@runtime_checkable
class FinitePromptSource(PromptSource, Protocol):
    """A source whose tasks can be looked through before a run."""

    def tasks(self) -> Iterator[tuple[str, PromptRecord]]:
        """Each task once, with its place for messages. Pictures are not read: `UNREAD` is that of every edit."""
        ...


@runtime_checkable
class PictureSource(PromptSource, Protocol):
    """A source that edits pictures in files."""

    def pictures(self) -> Iterator[tuple[str, Path]]:
        """The place and the file of every picture."""
        ...


def group_key(prompt: str, image: np.ndarray | None) -> str:
    """The prompt; for an edit, the prompt and the picture."""
    if image is None:
        return prompt
    return f"{prompt}\n{hashlib.sha1(np.ascontiguousarray(image).tobytes()).hexdigest()}"


def source_pictures(records: Sequence[PromptRecord], height: int, width: int) -> list[list[Image.Image]] | None:
    """What each record edits, as a list of one picture of this size, or None when they edit nothing.

    Raises:
      ConfigError: when only some have one.
    """
    missing = [record.image is None for record in records]
    if all(missing):
        return None
    if any(missing):
        raise ConfigError("Some prompts of a batch have an image and some have none; use one source for each kind.")
    return [[resized(Image.fromarray(record.image), height, width)] for record in records]


def stack_sources(sources: Sequence[Sequence[Image.Image]] | None) -> np.ndarray | None:
    """`source_pictures` as float32 [N, H, W, 3] in [-1, 1], or None."""
    if sources is None:
        return None
    return to_model([row[0] for row in sources], *sources[0][0].size[::-1])


def make_source(config: Mapping[str, Any], seed: int) -> PromptSource:
    """The source that `config` describes: its `kind`, and options of that kind. A `seed` among them overrules `seed`.

    Raises:
      ValueError: for an unknown kind or option.
    """
    return SOURCES.make(config, seed=seed)


def look_through(source: PromptSource, memory: Path | None = None) -> None:
    """Decodes each picture that a source of files names, in threads, so that a broken one is known of before a run.

    Args:
      memory: a file of the run, in which is noted what was looked through. It is not looked through again when the run goes on:
        a picture that breaks meanwhile is a failure that is counted (`PromptRecord.error`), with or without an interruption.

    Raises:
      ValueError: naming the first broken picture and its place, and how many there are.
    """
    if not isinstance(source, PictureSource):
        return
    places: dict[Path, str] = {}
    for place, path in source.pictures():
        places.setdefault(path, place)
    named = "".join(f"{path}\n" for path in places)
    digest = hashlib.blake2b(os.fsencode(named), digest_size=16).hexdigest()
    if not places or (memory is not None and memory.is_file() and digest in memory.read_text().split()):
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = pool.map(lambda found: _problem(*found), places.items())
        bar = tqdm(errors, total=len(places), unit="picture", desc="looking through prompts", disable=None)
        broken = [error for error in bar if error]
    if broken:
        others = f" ({len(broken) - 1} others are broken too)" if len(broken) > 1 else ""
        raise ValueError(f"{broken[0].rstrip('.')}{others}.")
    if memory is not None:
        with memory.open("a") as file:
            file.write(f"{digest}\n")


def _problem(path: Path, place: str) -> str | None:
    """Why a picture cannot be read."""
    try:
        decode(path, place)
    except BadRecord as error:
        return str(error)
    return None


@SOURCES.register("jsonl")
class JSONLSource:
    """Tasks from a file with one JSON object per line: GenEval metadata, or a manifest of edits.

    A line has `prompt` (or `instruction`), for an edit `image` or `input_images`, a path relative to the file, and anything
    else, which becomes the metadata together with `index`, the line's number from 0. Other usual names do as well, see
    `readers.fields`: what launch.prepare_data reads as an edit is one here.

    Attributes:
      shuffle: a new order each time the file has been gone through; otherwise the file's order, over and over.
      task: 'edit' when every line must have an image, 't2i' when none may; None: as the file is.
    """

    def __init__(self, path: str, seed: int = 0, shuffle: bool = True, task: str | None = None):
        copied = fetched_files(path, (".jsonl",), beside=True) if is_address(path) else path
        self.path, self.seed, self.shuffle = Path(copied), seed, shuffle
        if not self.path.is_file():
            raise FileNotFoundError(f"The prompt file {path} does not exist; check the path.")
        text = read_text(self.path).rstrip()
        if not text:
            raise ValueError(f"The prompt file {path} holds no prompts; give one JSON object per line.")
        self.rows = [self._row(number, line, task) for number, line in enumerate(text.split("\n"))]
        if len({row["image"] is None for row in self.rows}) > 1:
            raise ValueError(f"Some lines of {path} have an image and some have none; split it into two files.")
        if task is not None and (task == "edit") != (self.rows[0]["image"] is not None):
            found, wanted = ("no images", "an image to edit in every line") if task == "edit" else ("images", "none")
            raise ValueError(
                f"The prompt file {path} is for the task '{task}' and has {found}; give one with {wanted}."
            )

    def _row(self, number: int, line: str, task: str | None) -> dict[str, Any]:
        place = self.place(number)
        if not line.strip():
            raise ValueError(f"{place} is empty; remove it or write the prompt that belongs there.")
        where = place[0].lower() + place[1:]
        metadata = parse_json(line, where)
        # What is missing is found when the pictures are looked through; a run that goes on may have lost some.
        task_of_row = parse_task(metadata, self.path.parent, where, task, exists=False)
        if len(task_of_row.images) > 1:
            raise ValueError(f"{place} has {len(task_of_row.images)} pictures to edit and one is taken here; keep one.")
        image = task_of_row.images[0] if task_of_row.images else None
        return {"prompt": task_of_row.prompt, "image": image, "metadata": {"index": number, **metadata}, "where": where}

    def place(self, row: int) -> str:
        """The place of a row in the file, for messages: 'Line 3 of train.jsonl'."""
        return f"Line {row + 1} of {self.path}"

    def __len__(self) -> int:
        return len(self.rows)

    def tasks(self) -> Iterator[tuple[str, PromptRecord]]:
        """See `FinitePromptSource`."""
        for number, row in enumerate(self.rows):
            yield self.place(number), PromptRecord(row["prompt"], row["image"] and UNREAD, row["metadata"])

    def pictures(self) -> Iterator[tuple[str, Path]]:
        """See `PictureSource`."""
        return ((row["where"], row["image"]) for row in self.rows if row["image"] is not None)

    def batch(self, step: int, count: int) -> list[PromptRecord]:
        """Tasks step * count ... of the endless sequence of (shuffled) passes through the file.

        A picture that cannot be read is `UNREAD`, and the record says why.
        """
        records = []
        for position in range(step * count, (step + 1) * count):
            epoch, place = divmod(position, len(self.rows))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows)) if self.shuffle else None
            row = self.rows[place if order is None else order[place]]
            records.append(self._record(row))
        return records

    def _record(self, row: Mapping[str, Any]) -> PromptRecord:
        if row["image"] is None:
            return PromptRecord(row["prompt"], None, row["metadata"])
        try:
            image = np.asarray(decode(row["image"], row["where"]))
        except BadRecord as error:
            key = f"{row['prompt']}\n{row['image']}"
            return PromptRecord(row["prompt"], UNREAD, row["metadata"], key, error=str(error))
        return PromptRecord(row["prompt"], image, row["metadata"])


@SOURCES.register("turns")
class TurnsSource:
    """Several sources that take turns, a step each, so that one stage can train edits and text-to-image.

    A record's metadata says as `dataset` which it is from, so that rewards can be for some of them.

    Attributes:
      sources: name -> description of a source, in the order of their turns.
    """

    def __init__(self, sources: Mapping[str, Mapping[str, Any]], seed: int = 0):
        if not sources:
            raise ValueError("A prompt source of turns has no sources; name at least one.")
        self.sources = [(name, make_source(fields, seed)) for name, fields in sources.items()]

    def tasks(self) -> Iterator[tuple[str, PromptRecord]]:
        """Those of its finite sources."""
        for name, source in self.sources:
            if isinstance(source, FinitePromptSource):
                for place, record in source.tasks():
                    yield place, _of_dataset(name, record)

    def pictures(self) -> Iterator[tuple[str, Path]]:
        """Those of all sources that have some."""
        for _, source in self.sources:
            if isinstance(source, PictureSource):
                yield from source.pictures()

    def batch(self, step: int, count: int) -> list[PromptRecord]:
        """The next batch of the source whose turn it is."""
        name, source = self.sources[step % len(self.sources)]
        records = source.batch(step // len(self.sources), count)
        return [_of_dataset(name, record) for record in records]


def _of_dataset(name: str, record: PromptRecord) -> PromptRecord:
    return dataclasses.replace(record, metadata={**record.metadata, "dataset": name})
