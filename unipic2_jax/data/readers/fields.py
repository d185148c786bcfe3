"""The names under which data sets usually keep a picture, its text and the pictures that were edited."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from unipic2_jax.data.records import BadRecord, Encoded, Record

# The first one that is there counts. Results of edits come first: their data sets call the source 'image' as well.
IMAGE = ("output_image", "edited_image", "target_image", "image", "file_name", "jpg", "jpeg", "png", "webp")
PROMPT = ("caption", "text", "prompt", "instruction", "edit_prompt")
REFERENCES = ("input_images", "input_image", "source_images", "source_image", "original_image", "input")
# Names of classes, where a data set has no other text.
LABEL = "label"
# Where one of these is used but there is no reference, the picture to edit was forgotten.
EDITS_ONLY = {"output_image", "edited_image", "target_image", "instruction", "edit_prompt"}


def find(values: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the names under which there is something."""
    return next((name for name in names if values.get(name) is not None), None)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      BadRecord: 'not-json'.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord("not-json", f"There is no valid JSON in {where} ({error}); correct it.") from error
    if not isinstance(values, dict):
        raise BadRecord("not-json", f"There is no JSON object in {where}, but {type(values).__name__}; correct it.")
    return values


def parse_text(data: Any, where: str) -> str:
    """A prompt (str, or bytes in UTF-8) without the space around it.

    Raises:
      BadRecord: 'missing-caption', 'not-text' or 'empty-prompt'.
    """
    if data is None:
        raise BadRecord("missing-caption", f"There is no caption in {where}; add one or remove the record.")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise BadRecord(
            "not-text", f"The caption in {where} is not UTF-8 ({error.reason}); save it as such."
        ) from error
    if not isinstance(text, str):
        raise BadRecord("not-text", f"The caption in {where} is no text but {type(text).__name__}; correct it.")
    if not text.strip():
        raise BadRecord("empty-prompt", f"The caption in {where} is empty; write one or remove the record.")
    return text.strip()


def pick_columns(
    image: str | None,
    prompt: str | None,
    references: str | Sequence[str] | None,
    pictures: Collection[str],
    texts: Collection[str],
    where: str,
) -> tuple[str, str, tuple[str, ...]]:
    """The columns of a table for the picture, its text and its references: those that are named, else the first usual ones.

    Args:
      references: None for the usual ones, () for none.
      pictures, texts: columns of a fitting type.

    Raises:
      ValueError: when there is no usual one.
    """
    first = lambda names, columns: next((name for name in names if name in columns), None)
    image, prompt = image or first(IMAGE, pictures), prompt or first((*PROMPT, LABEL), texts)
    for option, column, columns in (("image", image, pictures), ("prompt", prompt, texts)):
        if column is None:
            some = f"one of {', '.join(columns)}" if columns else "a column"
            raise ValueError(
                f"There is no column with the usual name of the {option} in {where}; set {option} to {some}."
            )
    if references is None:
        source = first(REFERENCES, pictures)
        if source is None and {image, prompt} & EDITS_ONLY:
            raise ValueError(f"There are edits but no usual column of what was edited in {where}; set references.")
        references = () if source is None else source
    return image, prompt, (references,) if isinstance(references, str) else tuple(references)


def check_edit(names: set[str | None], references: tuple[Encoded, ...], where: str) -> None:
    """What is named as an edit must have a picture that was edited, else its result would be learnt as if it had none.

    Raises:
      BadRecord: 'missing-reference'.
    """
    if not references and (edits := names & EDITS_ONLY):
        sentence = f"There is '{edits.pop()}' but no input_images in {where}; add the pictures that were edited."
        raise BadRecord("missing-reference", sentence)


def parse_line(values: Mapping[str, Any], folder: Path, where: str) -> Record:
    """A line of a manifest, whose pictures are paths relative to `folder`.

    Raises:
      BadRecord: 'missing-field', 'missing-image', 'missing-reference', 'not-text' or 'empty-prompt'.
    """
    image, prompt, references = find(values, IMAGE), find(values, PROMPT), find(values, REFERENCES)
    for name, wanted in ((image, "image"), (prompt, "caption")):
        if name is None:
            raise BadRecord("missing-field", f"There is no '{wanted}' in {where}; add it.")
    sources = values[references] if references else []
    sources = sources if isinstance(sources, list) else [sources]
    for path in (values[image], *sources):
        if not isinstance(path, str):
            raise BadRecord("missing-field", f"A picture in {where} is no path but {type(path).__name__}; correct it.")
        if not (folder / path).is_file():
            raise BadRecord(
                "missing-image", f"The picture {folder / path} of {where} does not exist; correct the path."
            )
    paths = tuple(folder / path for path in sources)
    check_edit({image, prompt}, paths, where)
    return Record(folder / values[image], parse_text(values[prompt], where), paths, where)
