"""Pictures and raw scores of a step, kept for people who want to see what a reward rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.scoring import Scored


def write_audit(
    folder: Path,
    numbers: Sequence[int] | np.ndarray,
    images: Sequence[np.ndarray] | np.ndarray,
    records: Sequence[PromptRecord],
    scored: Scored,
) -> None:
    """Writes NNNNN.png for each image, NNNNN_source.png where a new one was edited, and scores_FIRST.jsonl.

    Args:
      numbers: of the images among all of the step; several processes, and parts of a step, write into one folder.
      scored: of these images; a score that failed is null and has the sentence that says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = lambda value: None if np.isnan(value) else float(value)
    lines, sources = [], {}
    for index, (number, image, record) in enumerate(zip(numbers, images, records, strict=True)):
        name = f"{number:05d}"
        Image.fromarray(image).save(folder / f"{name}.png")
        row = {"image": f"{name}.png", "prompt": record.prompt, "rewards": {}}
        if record.image is not None:
            if record.key not in sources:
                sources[record.key] = f"{name}_source.png"
                Image.fromarray(record.image).save(folder / sources[record.key])
            row["source"] = sources[record.key]
        for reward, values in scored.values.items():
            if scored.asked[reward][index]:
                details = {detail: known(column[index]) for detail, column in scored.details[reward].items()}
                row["rewards"][reward] = {"score": known(values[index]), **details}
                if sentence := scored.errors[reward].get(index):
                    row["rewards"][reward]["error"] = sentence
        lines.append(json.dumps(row))
    (folder / f"scores_{numbers[0]:05d}.jsonl").write_text("\n".join(lines) + "\n")
