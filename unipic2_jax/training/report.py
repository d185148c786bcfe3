"""report.md: what every stage changed on the held-out prompts, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unipic2_jax.evaluation.statistics import Comparison, paired_bootstrap
from unipic2_jax.training.metrics import read_evaluations


def compare_stages(records: list[dict[str, Any]]) -> dict[str, dict[str, Comparison]]:
    """{stage: {score: comparison of its first and last evaluation}} from evaluation records (see metrics.py).

    With several stages, a last entry 'all stages' compares the first evaluation of all with the last.
    """
    stages: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        stages.setdefault((record["stage_index"], record["stage"]), []).append(record)
    pairs = {stage: (found[0], found[-1]) for (_, stage), found in sorted(stages.items())}
    if len(pairs) > 1:
        ends = list(pairs.values())
        pairs["all stages"] = (ends[0][0], ends[-1][1])
    return {
        stage: {
            name: paired_bootstrap(_scores(first, name), _scores(last, name))
            for name in first["scores"]
            if name in last["scores"] and _has_pairs(first, last, name)
        }
        for stage, (first, last) in pairs.items()
        if first is not last
    }


def table(comparisons: dict[str, dict[str, Comparison]]) -> str:
    """The comparisons as a Markdown table."""
    lines = [
        "| stage | score | before | after | difference [95% interval] | prompts |",
        "|---|---|---:|---:|---|---:|",
    ]
    for stage, scores in comparisons.items():
        for name, c in scores.items():
            verdict = " ▲" if c.risen else " ▼" if c.fallen else ""
            lines.append(
                f"| {stage} | {name} | {c.before:.3f} | {c.after:.3f} "
                f"| {c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]{verdict} | {c.prompts} |"
            )
    return "\n".join(lines) + "\n"


def write_report(workdir: Path, title: str = "Run") -> Path:
    """Writes report.md from the evaluation records and pictures in `workdir`."""
    records = read_evaluations(workdir)
    comparisons = compare_stages(records)
    parts = [f"# {title}\n"]
    if any(comparisons.values()):
        parts.append("## Before and after\n")
        parts.append(
            "The same held-out prompts with the same seeds before and after each stage; the interval is a paired "
            "bootstrap over prompts. ▲ and ▼ mark intervals that do not contain zero.\n"
        )
        parts.append(table(comparisons))
    metrics = [record for record in records if record["metrics"]]
    if metrics:
        parts.append("## Evaluations\n")
        names = list(dict.fromkeys(name for record in metrics for name in record["metrics"]))
        parts.append("| stage | step | " + " | ".join(names) + " |\n|---|---:|" + "---:|" * len(names))
        for record in metrics:
            cells = [f"{record['metrics'][name]:.4g}" if name in record["metrics"] else "" for name in names]
            parts.append(f"| {record['stage']} | {record['step']} | " + " | ".join(cells) + " |")
        parts.append("")
    if (workdir / "curves.png").exists():
        parts.append("## Curves\n\n![curves](curves.png)\n")
    pictures = sorted((workdir / "samples").glob("*.png"))
    if pictures:
        parts.append("## Samples\n")
        parts += [f"{picture.stem}\n\n![{picture.stem}](samples/{picture.name})\n" for picture in pictures]
    path = workdir / "report.md"
    path.write_text("\n".join(parts))
    return path


def _scores(record: dict[str, Any], name: str) -> np.ndarray:
    return np.array(record["scores"][name], np.float64)  # null, a score that failed, becomes NaN


def _has_pairs(first: dict[str, Any], last: dict[str, Any], name: str) -> bool:
    before, after = _scores(first, name), _scores(last, name)
    return before.shape == after.shape and bool((~np.isnan(before) & ~np.isnan(after)).any())
