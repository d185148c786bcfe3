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
    own = own_share(len(records), mesh)
    rows = slice(own.start * samples, own.stop * samples)
    repeated = [record for record in records[own] for _ in range(samples)]
    scored = scorer.score(list(images[rows]), repeated)
    made: dict[str, np.ndarray] = {}
    for name, values in scored.values.items():
        made |= {name: values, **{f"{name}_{detail}": row for detail, row in scored.details[name].items()}}
    errors = [
        [rows.start + i, f"{name}: {sentence}"]
        for name, found in scored.errors.items()
        for i, sentence in found.items()
    ]
    share = [len(repeated), {title: column.tolist() for title, column in made.items()}, errors]
    shares = gather_json(share, mesh)
    titles = dict.fromkeys(title for _, found, _ in shares for title in found)
    # A process all of whose calls failed knows no details.
    whole = {
        title: np.concatenate([found.get(title, [np.nan] * count) for count, found, _ in shares]) for title in titles
    }
    sentences: dict[int, list[str]] = {}
    for place, sentence in (pair for _, _, found in shares for pair in found):
        sentences.setdefault(place, []).append(sentence)
    return whole, sentences


def means(tables: Mapping[str, np.ndarray], records: Sequence[PromptRecord]) -> dict[str, float]:
    """Of tables [records, samples] by title: the mean of each, and '{title}/{tag}', that of every tag; one over nothing is left out."""
    tags = np.array([str(record.metadata.get("tag", "")) for record in records])
    found = {}
    for title, table in tables.items():
        rows = {title: np.ones(len(tags), bool), **{f"{title}/{t}": tags == t for t in dict.fromkeys(tags) if t}}
        valid = {name: table[row][~np.isnan(table[row])] for name, row in rows.items()}
        found |= {name: float(values.mean()) for name, values in valid.items() if values.size}
    return found


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
    for own, record in zip(pictures, records):
        if record.image is not None:
            shown.append(record.image)
            captions.append("source")
        shown += list(own[:samples])
        captions += [record.prompt] * samples
    together = samples + (records[0].image is not None)
    return contact_sheet(shown, captions, columns=together * max(1, 6 // together))
