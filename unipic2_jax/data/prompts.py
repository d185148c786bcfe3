"""What a model is asked to do during reinforcement and evaluation: prompts, with a source image when it is an edit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from unipic2_jax.data.images import read_image
from unipic2_jax.data.kinds import make_kind

# Kind -> 'module:class'; a class takes (seed, **options) and is a PromptSource.
SOURCES: dict[str, Any] = {
    "shapes": "unipic2_jax.data.shapes.sources:ShapesSource",
    "jsonl": "unipic2_jax.data.prompts:JSONLSource",
    "geneval": "unipic2_jax.data.geneval_prompts:OfficialSource",
    "turns": "unipic2_jax.data.prompts:TurnsSource",
    "blank": "unipic2_jax.data.blank:BlankSource",
}

# Stands for a picture that is not needed yet.
UNREAD = np.zeros((1, 1, 3), np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptRecord:
    """One task for the model."""

    prompt: str
    image: np.ndarray | None = None  # uint8 [H, W, 3], what to edit
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # what rewards need to know
    key: str = ""  # samples with equal keys form a group; by default made of prompt and image

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


def group_key(prompt: str, image: np.ndarray | None) -> str:
    """The prompt; for an edit, the prompt and the picture."""
    if image is None:
        return prompt
    return f"{prompt}\n{hashlib.sha1(np.ascontiguousarray(image).tobytes()).hexdigest()}"


def make_source(config: Mapping[str, Any], seed: int) -> PromptSource:
    """The source that `config` describes: its `kind`, and options of that kind. A `seed` among them overrules `seed`.

    Raises:
      ValueError: for an unknown kind or option.
    """
    return make_kind(SOURCES, "prompt source", config, seed=seed)


class JSONLSource:
    """Tasks from a file with one JSON object per line: GenEval metadata, or a manifest of edits.

    A line has `prompt` (or `instruction`), for an edit `image`, a path relative to the file, and anything else, which
    becomes the metadata together with `index`, the line's number from 0.

    Attributes:
      shuffle: a new order each time the file has been gone through; otherwise the file's order, over and over.
      task: 'edit' when every line must have an image, 't2i' when none may; None: as the file is.
    """

    def __init__(self, path: str, seed: int = 0, shuffle: bool = True, task: str | None = None):
        self.path, self.seed, self.shuffle = Path(path), seed, shuffle
        if not self.path.is_file():
            raise FileNotFoundError(f"The prompt file {path} does not exist; check the path.")
        try:
            text = (content := self.path.read_bytes()).decode().rstrip()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"Line {line} of {path} is not text in UTF-8; save the file as UTF-8.") from error
        if not text:
            raise ValueError(f"The prompt file {path} holds no prompts; give one JSON object per line.")
        # `splitlines` would also split at separators that JSON allows inside of a text.
        self.rows = [self._row(number, line) for number, line in enumerate(text.split("\n"))]
        if len({row["image"] is None for row in self.rows}) > 1:
            raise ValueError(f"Some lines of {path} have an image and some have none; split it into two files.")
        if task is not None and (task == "edit") != (self.rows[0]["image"] is not None):
            found, wanted = ("no images", "an image to edit in every line") if task == "edit" else ("images", "none")
            raise ValueError(
                f"The prompt file {path} is for the task '{task}' and has {found}; give one with {wanted}."
            )

    def _row(self, number: int, line: str) -> dict[str, Any]:
        where = self.place(number)
        if not line.strip():
            raise ValueError(f"{where} is empty; remove it or write the prompt that belongs there.")
        try:
            metadata = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); correct it.") from error
        prompt = metadata.get("prompt", metadata.get("instruction")) if isinstance(metadata, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where} has no prompt; add a text called 'prompt'.")
        image = metadata.get("image")
        if image is not None:
            if not isinstance(image, str):
                raise ValueError(f"{where} has {image!r} as its image; write a path, or leave 'image' out.")
            image = self.path.parent / image
            if not image.is_file():
                raise FileNotFoundError(f"{where} names the image {image}, which does not exist; check the path.")
        return {"prompt": prompt, "image": image, "metadata": {"index": number, **metadata}}

    def place(self, row: int) -> str:
        """Of a row in the file, for messages: 'Line 3 of train.jsonl'."""
        return f"Line {row + 1} of {self.path}"

    def __len__(self) -> int:
        return len(self.rows)

    def tasks(self) -> Iterator[tuple[str, PromptRecord]]:
        """See `FinitePromptSource`."""
        for number, row in enumerate(self.rows):
            yield self.place(number), PromptRecord(row["prompt"], row["image"] and UNREAD, row["metadata"])

    def batch(self, step: int, count: int) -> list[PromptRecord]:
        """Tasks step * count ... of the endless sequence of (shuffled) passes through the file."""
        records = []
        for position in range(step * count, (step + 1) * count):
            epoch, place = divmod(position, len(self.rows))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows)) if self.shuffle else None
            row = self.rows[place if order is None else order[place]]
            image = None if row["image"] is None else np.asarray(read_image(row["image"]))
            records.append(PromptRecord(row["prompt"], image, row["metadata"]))
        return records


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

    def batch(self, step: int, count: int) -> list[PromptRecord]:
        """The next batch of the source whose turn it is."""
        name, source = self.sources[step % len(self.sources)]
        records = source.batch(step // len(self.sources), count)
        return [_of_dataset(name, record) for record in records]


def _of_dataset(name: str, record: PromptRecord) -> PromptRecord:
    return dataclasses.replace(record, metadata={**record.metadata, "dataset": name})
