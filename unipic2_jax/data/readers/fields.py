"""Which field of a record is what: one table for preparation, prompts of reinforcement and evaluation, and lists of edits.

The names are those of the data sets and trainers that people come from; docs/data.md lists them with where they are from.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unipic2_jax.data.records import Record
from unipic2_jax.data.text import check_unicode, decoded
from unipic2_jax.pictures.decode import SUFFIXES, BadRecord, Encoded

# Of each role, the first name that is there counts. What an edit came to:
RESULTS = ("output_image", "edited_image", "target_image", "edited_img", "target_img", "output", "edited", "target")
# The pictures that were edited. With a number behind it (control_path_0, input_1) a name stands for one of several.
SOURCES = (
    *("input_images", "input_image", "source_images", "source_image", "original_image", "input"),
    *("src_img", "source_img", "src_image", "control_image", "control_images", "control_path"),
    *("conditioning_image", "conditioning_images", "condition_image", "cond_image", "edit_image", "edit_images"),
    *("kontext_images", "reference_image", "reference_images", "ref_image", "ref_images", "source", "src", "control"),
)
# A picture of which the other fields say whether it is to be learnt or to be edited.
PICTURES = (
    *("image", "file_name", "image_path", "image_file", "img", "img_path", "filename"),
    *(suffix.removeprefix(".") for suffix in SUFFIXES),
)
INSTRUCTIONS = ("instruction", "edit_instruction", "edit_prompt", "edited_prompt_list", "edit")
PROMPT = "prompt"
CAPTIONS = ("caption", "text")
# Lists of texts that say the same at growing length, of which the last is taken.
TEXT_LISTS = ("edited_prompt_list",)
# Names of classes, where a data set has no other text.
LABEL = "label"
# Names of pictures for which there is no use here.
UNUSED = ("mask", "mask_image", "mask_img", "mask_path", "id", "image_id", "key", "name", "url")
# Names that data sets use for other things too, so that they count when there is a picture under them.
_VAGUE = {"output", "edited", "target", "input", "source", "src", "control", "filename", "img"}
_NUMBERED = re.compile(r"(.+?)_?(\d+)")

# Texts in the order of what fits best: to an edit, to a picture with its text, and to what is asked for without a picture.
EDIT_TEXTS = (*INSTRUCTIONS, PROMPT, *CAPTIONS)
EXAMPLE_TEXTS = (*CAPTIONS, PROMPT, *INSTRUCTIONS)
TASK_TEXTS = (PROMPT, *CAPTIONS, *INSTRUCTIONS)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is asked for: a text, and the files of the pictures to edit; none for text-to-image."""

    prompt: str
    images: tuple[Path, ...] = ()


def first(names: Iterable[str], present: Collection[str]) -> str | None:
    """The first of the names that is among those found."""
    return next((name for name in names if name in present), None)


def is_known(name: str) -> bool:
    """Whether a field of this name may hold a picture."""
    return name in RESULTS or name in PICTURES or name in UNUSED or _source(name) is not None


def _source(name: str) -> tuple[str, int] | None:
    """The name in SOURCES that this is, and the number behind it or -1."""
    if name in SOURCES:
        return name, -1
    numbered = _NUMBERED.fullmatch(name)
    return (numbered[1], int(numbered[2])) if numbered and numbered[1] in SOURCES else None


def find_pictures(names: Collection[str], where: str) -> tuple[str | None, tuple[str, ...]]:
    """Which field holds the picture to learn, and which hold the pictures that were edited, in order.

    A picture beside a result is what was edited, and a picture beside what was edited is the result.

    Raises:
      BadRecord: 'two-sources', when pictures to edit go by two different names.
    """
    sources: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if source := _source(name):
            sources.setdefault(source[0], []).append((source[1], name))
    if len(sources) > 1:
        one, other = list(sources)[:2]
        sentence = f"Both '{one}' and '{other}' in {where} are pictures to edit; keep one of them."
        raise BadRecord("two-sources", sentence)
    references = tuple(name for numbered_names in sources.values() for _, name in sorted(numbered_names))
    result, picture = first(RESULTS, names), first(PICTURES, names)
    if result and picture and not references:
        references = (picture,)
    return result or picture, references


def looks_like_picture(value: Any) -> bool:
    """Whether a value is the path of a picture, or a list of some."""
    if isinstance(value, list):
        return bool(value) and all(map(looks_like_picture, value))
    return isinstance(value, str) and value.lower().endswith(SUFFIXES) and "://" not in value and "\n" not in value


def read_pictures(values: Mapping[str, Any], where: str) -> tuple[str | None, tuple[str, ...]]:
    """`find_pictures` of a record of JSON.

    Raises:
      BadRecord: 'unknown-picture' when a field of another name seems to hold pictures; 'two-sources'.
    """
    texts = {*EXAMPLE_TEXTS, LABEL}
    for name, value in values.items():
        if name not in texts and not is_known(name) and looks_like_picture(value):
            sentence = (
                f"There is a picture under '{name}' in {where}, and what it is for is not known; call it input_images when it is "
                "to be edited, output_image when it is a result, or put it into an object ('metadata') when it is neither."
            )
            raise BadRecord("unknown-picture", sentence)
    held = lambda name: looks_like_picture(values[name]) if name in _VAGUE else values[name] not in (None, [])
    return find_pictures([name for name in values if name not in texts and held(name)], where)


def parse_json(data: str | bytes, where: str) -> dict[str, Any]:
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
    """A prompt (str, or a file's bytes in UTF-8) without the space around it.

    Raises:
      BadRecord: 'missing-caption', 'not-text', 'not-unicode' or 'empty-prompt'.
    """
    if data is None:
        raise BadRecord("missing-caption", f"There is no caption in {where}; add one or remove the record.")
    try:
        text = decoded(data) if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise BadRecord(
            "not-text", f"The caption in {where} is not UTF-8 ({error.reason}); save it as such."
        ) from error
    if not isinstance(text, str):
        raise BadRecord("not-text", f"The caption in {where} is no text but {type(text).__name__}; correct it.")
    if not text.strip():
        raise BadRecord("empty-prompt", f"The caption in {where} is empty; write one or remove the record.")
    return check_unicode(text.strip(), where)


def pick_text(name: str | None, value: Any) -> Any:
    """What is under a name of a text: of some lists the last."""
    return (value[-1] if value else None) if name in TEXT_LISTS and isinstance(value, list) else value


def pick_columns(
    image: str | None,
    prompt: str | None,
    references: str | Sequence[str] | None,
    pictures: Collection[str],
    texts: Collection[str],
    where: str,
) -> tuple[str, str, tuple[str, ...]]:
    """The columns of a table for the picture, its text and its references: those that are named, else the usual ones.

    Args:
      references: None for the usual ones, () for none.
      pictures, texts: columns of a fitting type.

    Raises:
      ValueError: when there is no usual one, or a column of pictures of which the name says nothing.
    """
    asked = references
    if references is None:
        usual, sources = find_pictures(pictures, where)
        references = tuple(name for name in sources if name != image)
    else:
        references = (references,) if isinstance(references, str) else tuple(references)
        usual = first((*RESULTS, *PICTURES), [name for name in pictures if name not in references])
    image = image or usual
    prompt = prompt or first((*(EDIT_TEXTS if references else EXAMPLE_TEXTS), LABEL), texts)
    for option, column, columns in (("image", image, pictures), ("prompt", prompt, texts)):
        if column is None:
            some = f"one of {', '.join(columns)}" if columns else "a column"
            raise ValueError(
                f"There is no column with the usual name of the {option} in {where}; set {option} to {some}."
            )
    if asked is None and not references and (image in RESULTS or prompt in INSTRUCTIONS):
        raise ValueError(f"There are edits but no usual column of what was edited in {where}; set references.")
    return image, prompt, references


def check_columns(pictures: Collection[str], named: Collection[str], where: str) -> None:
    """Refuses columns of pictures whose role neither their names nor the person says.

    Raises:
      ValueError: naming the first.
    """
    if unknown := [name for name in pictures if name not in named and not is_known(name)]:
        raise ValueError(
            f"There is a column '{unknown[0]}' with pictures in {where}, and what they are for is not known; set references to "
            "the columns of what was edited, or to () when there are none."
        )


def check_edit(names: Collection[str | None], references: tuple[Encoded, ...], where: str) -> None:
    """What is named as an edit must have a picture that was edited, else its result would be learnt as if it had none.

    Raises:
      BadRecord: 'missing-reference'.
    """
    if not references and (edits := [name for name in names if name in RESULTS or name in INSTRUCTIONS]):
        sentence = f"There is '{edits[0]}' but no input_images in {where}; add the pictures that were edited."
        raise BadRecord("missing-reference", sentence)


def find_file(text: Any, folder: Path, where: str, exists: bool = True) -> Path:
    """The picture that a manifest in `folder` names; Windows' separators are understood where there is no such file.

    Args:
      exists: whether it has to be there.

    Raises:
      BadRecord: 'missing-field' or 'missing-image'.
    """
    if not isinstance(text, str):
        raise BadRecord("missing-field", f"A picture in {where} is no path but {type(text).__name__}; write a path.")
    path = folder / text
    if not path.is_file() and "\\" in text:
        path = folder / text.replace("\\", "/")
    if exists and not path.is_file():
        raise BadRecord("missing-image", f"The picture {path} of {where} does not exist; correct the path.")
    return path


def find_files(
    values: Mapping[str, Any], names: Iterable[str], folder: Path, where: str, exists: bool = True
) -> tuple[Path, ...]:
    """The pictures under these names, each of which has one or a list; errors as of `find_file`."""
    listed = [values[name] if isinstance(values[name], list) else [values[name]] for name in names]
    return tuple(find_file(path, folder, where, exists) for paths in listed for path in paths)


def parse_line(values: Mapping[str, Any], folder: Path, where: str) -> Record:
    """A line of a manifest as a picture with its text; paths are relative to `folder`.

    Raises:
      BadRecord: 'missing-field', 'missing-image', 'missing-reference', 'unknown-picture', 'two-sources', and those of `parse_text`.
    """
    image, names = read_pictures(values, where)
    prompt = _text_field(values, EDIT_TEXTS if names else EXAMPLE_TEXTS)
    for name, wanted in ((image, "image"), (prompt, "caption")):
        if name is None:
            raise BadRecord("missing-field", f"There is no '{wanted}' in {where}; add it.")
    picture, references = find_file(values[image], folder, where), find_files(values, names, folder, where)
    check_edit((image, prompt), references, where)
    return Record(picture, parse_text(pick_text(prompt, values[prompt]), where), references, where)


def parse_task(
    values: Mapping[str, Any], folder: Path, where: str, task: str | None = None, exists: bool = True
) -> Task:
    """A line of a manifest as what is asked for; a result in it is not looked at.

    A picture that is alone is what is edited, except when its text is a caption: then it is a result.

    Args:
      task: 'edit' when the line has to be an edit, so that a picture that is alone is edited whatever its text is called.
      exists: whether its pictures have to be there.

    Raises:
      BadRecord: as `parse_line`.
    """
    image, names = read_pictures(values, where)
    told = task == "edit" or any(values.get(name) is not None for name in (PROMPT, *INSTRUCTIONS))
    if not names and image is not None and image not in RESULTS and told:
        names = (image,)
    prompt = _text_field(values, EDIT_TEXTS if names else TASK_TEXTS)
    if prompt is None:
        raise BadRecord("missing-field", f"There is no prompt in {where}; add a text called 'prompt' or 'instruction'.")
    images = find_files(values, names, folder, where, exists)
    check_edit((image,), images, where)
    return Task(parse_text(pick_text(prompt, values[prompt]), where), images)


def _text_field(values: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if values.get(name) is not None), None)
