"""Lists of prompts and edits from files, and their pictures back into files: what the commands share."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unipic2_jax.data.readers.fields import parse_json, parse_task
from unipic2_jax.data.text import check_unicode, read_lines
from unipic2_jax.pictures.decode import read_image
from unipic2_jax.pictures.sheet import contact_sheet
from unipic2_jax.pipelines.pipeline import Pipeline

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# A contact sheet of more pictures is neither looked at nor cheap to hold.
SHEET_PICTURES = 64


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt and the pictures it is about: paths, or pictures after `load_images`; none when it is text-to-image."""

    prompt: str
    images: tuple[Any, ...] = ()


def read_jobs(file: str | os.PathLike, task: str | None = None) -> list[Job]:
    """Reads prompts, one per line, or, from a .jsonl file, JSON objects.

    An object has "prompt" or "instruction", and for an edit "image" or "input_images" (paths relative to the file), or other
    names of `data.readers.fields`. Empty lines are skipped.

    Args:
      task: 'edit' when every line is one; see `data.readers.fields.parse_task`.

    Raises:
      FileNotFoundError: when the file is missing.
      ValueError: when it holds no prompt, a line is not understood, or a picture does not exist; the message names the line.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no prompts file {file}; check the path.")
    numbered = read_lines(file)
    if not numbered:
        raise ValueError(f"{file} holds no prompt; write one per line.")
    return [_parse(line, f"line {number} of {file}", file, task) for number, line in numbered]


def _parse(line: str, where: str, file: Path, task: str | None) -> Job:
    if file.suffix != ".jsonl":
        return Job(check_unicode(line, where))
    task_of_line = parse_task(parse_json(line, where), file.parent, where, task)
    return Job(task_of_line.prompt, tuple(map(str, task_of_line.images)))


def load_images(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with their pictures read, each file once.

    Raises:
      FileNotFoundError, ValueError: when a picture is missing or damaged.
    """
    paths = dict.fromkeys(path for job in jobs for path in job.images)
    pictures = {path: read_image(path) for path in paths}
    return [dataclasses.replace(job, images=tuple(pictures[path] for path in job.images)) for job in jobs]


def check_target(out: str | os.PathLike) -> Path:
    """Where pictures go: a picture file by its suffix, else a folder. Creates what is missing above it.

    Raises:
      FileExistsError, IsADirectoryError: when something of the other kind is in the way.
      ValueError: for the suffix of a picture that is not written.
    """
    out, written = Path(out), ", ".join(PICTURE_SUFFIXES)
    if out.suffix.lower() not in PICTURE_SUFFIXES and out.suffix.lower() in Image.registered_extensions():
        raise ValueError(
            f"The output {out} ends as a picture that is not written here; use one of {written}, or a folder."
        )
    if out.suffix.lower() in PICTURE_SUFFIXES:
        if out.is_dir():
            raise IsADirectoryError(f"The output {out} is a folder although its name is a picture's; choose another.")
        out.parent.mkdir(parents=True, exist_ok=True)
    elif out.exists() and not out.is_dir():
        raise FileExistsError(f"The output {out} is a file; give a folder, or a name ending in .png.")
    else:
        out.mkdir(parents=True, exist_ok=True)
    return out


def run(
    pipe: Pipeline,
    jobs: Sequence[Job],
    out: Path,
    *,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    **options: Any,
) -> list[Path]:
    """Makes the pictures of all jobs and writes them as they come.

    Args:
      out: of `check_target`. A picture file gets the one picture, or the contact sheet of several; a folder gets
        `0000.png` (`0000_0.png` ... for several per prompt), `sheet.png` and `images.jsonl`.
      options: of `Pipeline.__call__`.

    Returns:
      The files written.
    """
    count = len(jobs) * num_images_per_prompt
    to_folder = out.suffix.lower() not in PICTURE_SUFFIXES
    if not to_folder and count > SHEET_PICTURES:
        raise ValueError(f"{count} pictures do not fit one sheet; give a folder instead of {out}.")
    made: dict[int, Image.Image] = {}
    written: dict[int, Path] = {}

    def keep(index: int, picture: Image.Image) -> None:
        job, sample = divmod(index, num_images_per_prompt)
        if job * num_images_per_prompt < SHEET_PICTURES:
            made[index] = picture
        if to_folder:
            name = f"{job:04}_{sample}.png" if num_images_per_prompt > 1 else f"{job:04}.png"
            picture.save(out / name)
            written[index] = out / name

    pipe(
        [job.prompt for job in jobs],
        [job.images for job in jobs] if any(job.images for job in jobs) else None,
        num_images_per_prompt=num_images_per_prompt,
        seed=seed,
        on_image=keep,
        **options,
    )
    files = [written[index] for index in sorted(written)]
    if to_folder:
        with (out / "images.jsonl").open("w", encoding="utf-8") as f:
            for index, file in sorted(written.items()):
                prompt = jobs[index // num_images_per_prompt].prompt
                f.write(json.dumps({"file": file.name, "prompt": prompt, "seed": seed + index}) + "\n")
        files.append(out / "images.jsonl")
    sheet = out / "sheet.png" if to_folder else out
    picture = made[0] if count == 1 and not to_folder else _sheet(jobs, made, num_images_per_prompt)
    picture.save(sheet)
    return [*files, sheet]


def _sheet(jobs: Sequence[Job], made: dict[int, Image.Image], samples: int) -> Image.Image:
    """A row per job where that fits: its sources, then its pictures."""
    cells: list[tuple[Image.Image, str]] = []
    widths = set()
    for number, job in enumerate(jobs):
        row_pictures = [made[i] for i in range(number * samples, (number + 1) * samples) if i in made]
        if row_pictures:
            cells += [(image, "source") for image in job.images] + [(image, job.prompt) for image in row_pictures]
            widths.add(len(job.images) + len(row_pictures))
    row = widths.pop() if len(widths) == 1 else 0
    pictures, captions = zip(*cells, strict=True)
    # Rows of one picture would make a tower, and very long ones a ribbon.
    return contact_sheet(pictures, captions, columns=row if 1 < row <= 8 else None)
