"""report.md: what every stage changed on the held-out prompts, and how sure that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from unipic2_jax.evaluation.statistics import Comparison, paired_bootstrap
from unipic2_jax.training.metrics import read_evaluations, read_rows


def compare_stages(records: list[dict[str, Any]]) -> dict[str, dict[str, Comparison]]:
    """{stage: {score: comparison of its first and last evaluation}} from evaluation records (see metrics.py).

    With several stages, a last entry 'all stages' compares the first evaluation of all with the last.
    """
    stages: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        stages.setdefault((record["stage_index"], record["stage"]), []).append(record)
    pairs = {stage: (steps[0], steps[-1]) for (_, stage), steps in sorted(stages.items())}
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


def rewards_apart(workdir: Path) -> list[dict[str, Any]]:
    """For stages with rewards that are only watched (weight 0), the mean of each reward in the rollouts of the first and the last tenth.

    Returns:
      Rows of 'stage', 'reward', 'trained' (whether it has a weight), 'before', 'after', 'noise' (what the difference would
      be by chance: the standard error of both means).
    """
    train = [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == "train"]
    stages = json.loads((workdir / "config.json").read_text())["stages"] if train else {}
    rows = []
    for stage in dict.fromkeys(row["stage"] for row in train):
        rewards = stages[stage].get("rewards") or {}
        weights = {name: fields.get("weight", 1.0) for name, fields in rewards.items()}
        if all(weights.values()):
            continue
        for name, weight in weights.items():
            values = np.array(
                [row[f"reward_{name}"] for row in train if row["stage"] == stage and f"reward_{name}" in row]
            )
            part = max(2, len(values) // 10)
            if len(values) < 2 * part:
                continue
            first, last = values[:part], values[-part:]
            noise = float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / part))
            means = {"before": float(first.mean()), "after": float(last.mean())}
            rows.append({"stage": stage, "reward": name, "trained": bool(weight), **means, "noise": noise})
    return rows


def rewards_table(rows: list[dict[str, Any]]) -> str:
    """`rewards_apart` as Markdown, and a sentence for each stage in which a watched reward fell while a trained one rose."""
    lines = ["| stage | reward | | first tenth | last tenth | difference |", "|---|---|---|---:|---:|---:|"]
    moved: dict[str, dict[bool, list[str]]] = {}
    for row in rows:
        difference = row["after"] - row["before"]
        what = "trained" if row["trained"] else "watched"
        lines.append(
            f"| {row['stage']} | {row['reward']} | {what} | {row['before']:.3f} | {row['after']:.3f} "
            f"| {difference:+.3f} ± {2 * row['noise']:.3f} |"
        )
        # Only the bad combination is collected: up where it is trained, down where it is not.
        if (difference if row["trained"] else -difference) > 2 * row["noise"]:
            moved.setdefault(row["stage"], {}).setdefault(row["trained"], []).append(row["reward"])
    for stage, names in moved.items():
        if len(names) == 2:
            lines.append(
                f"\n**In stage '{stage}' {', '.join(names[False])} fell while {', '.join(names[True])} rose: the model may be "
                "learning the reward's weaknesses; look at its pictures in audit/ and samples/.**"
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
    if apart := rewards_apart(workdir):
        parts.append("## Trained and watched rewards\n")
        parts.append("Means over the rollouts; a reward with weight 0 is not trained on.\n")
        parts.append(rewards_table(apart))
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
