"""What rewards say of pictures, in numbers for reports: a column each, means by tag, how many failed, and a sheet to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.parallel.processes import gather_json, own_share
from unipic2_jax.pictures.sheet import contact_sheet
from unipic2_jax.rewards.scoring import Entry, Scorer


def columns(
    scorer: Scorer, images: Sequence[np.ndarray], records: Sequence[PromptRecord], mesh: jax.sharding.Mesh
) -> tuple[dict[str, np.ndarray], dict[int, list[str]]]:
    """Scores every picture; each process asks about its share of the records.

    Args:
      images: uint8 [H, W, 3] each, as many of each record, which lie side by side.

    Returns:
      '{reward}' and '{reward}_{detail}' -> [pictures], NaN where there is no score, and picture -> why it lacks one.
    """
    samples = len(images) // len(records)
    share = own_share(len(records), mesh)
    rows = slice(share.start * samples, share.stop * samples)
    repeated = [record for record in records[share] for _ in range(samples)]
    scored = scorer.score(list(images[rows]), repeated)
    made: dict[str, np.ndarray] = {}
    for name, values in scored.values.items():
        made |= {name: values, **{f"{name}_{detail}": row for detail, row in scored.details[name].items()}}
    errors = [
        [rows.start + place, f"{name}: {sentence}"]
        for name, sentences in scored.errors.items()
        for place, sentence in sentences.items()
    ]
    parts = gather_json([len(repeated), {title: column.tolist() for title, column in made.items()}, errors], mesh)
    titles = dict.fromkeys(title for _, part, _ in parts for title in part)
    # A process all of whose calls failed knows no details.
    whole = {title: np.concatenate([part.get(title, [np.nan] * count) for count, part, _ in parts]) for title in titles}
    reasons: dict[int, list[str]] = {}
    for place, sentence in (pair for _, _, pairs in parts for pair in pairs):
        reasons.setdefault(place, []).append(sentence)
    return whole, reasons


def means(tables: Mapping[str, np.ndarray], records: Sequence[PromptRecord]) -> dict[str, float]:
    """The mean of each table [records, samples] by its title, and '{title}/{tag}', that of every tag; one over nothing is left out."""
    tags = np.array([str(record.metadata.get("tag", "")) for record in records])
    averages = {}
    for title, table in tables.items():
        rows = {title: np.ones(len(tags), bool), **{f"{title}/{t}": tags == t for t in dict.fromkeys(tags) if t}}
        valid = {name: table[row][~np.isnan(table[row])] for name, row in rows.items()}
        averages |= {name: float(values.mean()) for name, values in valid.items() if values.size}
    return averages


def failures(
    tables: Mapping[str, np.ndarray], records: Sequence[PromptRecord], entries: Mapping[str, Entry]
) -> dict[str, int]:
    """'{reward}_failed' -> how many pictures the reward was asked about and has no score for, where there are some."""
    counts = {
        name: sum(int(np.isnan(row).sum()) for row, record in zip(tables[name], records) if entry.is_about(record))
        for name, entry in entries.items()
        if name in tables
    }
    return {f"{name}_failed": count for name, count in counts.items() if count}


def sheet(pictures: Sequence[Sequence[np.ndarray]], records: Sequence[PromptRecord], most: int = 4) -> Image.Image:
    """At most so many pictures of a record side by side, its source picture first when there is one; a row holds whole records."""
    shown, captions = [], []
    samples = min(most, len(pictures[0]))
    for samples_of_record, record in zip(pictures, records):
        if record.image is not None:
            shown.append(record.image)
            captions.append("source")
        shown += list(samples_of_record[:samples])
        captions += [record.prompt] * samples
    together = samples + (records[0].image is not None)
    return contact_sheet(shown, captions, columns=together * max(1, 6 // together))
