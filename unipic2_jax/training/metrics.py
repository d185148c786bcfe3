"""What a run leaves to look at: metrics.jsonl, TensorBoard events, curves, sample pictures, evaluation records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from unipic2_jax.core.files import write_text
from unipic2_jax.training.timeline import Span

TIMELINE = "seconds_timeline"  # of a row: [name, begun, ended] of each span


class Metrics:
    """The records of a run in its folder. A resumed run first removes what lies beyond the step it continues from.

    Of several processes one writes; the others have records that keep nothing.
    """

    def __init__(self, workdir: Path, resumed_at: int, writes: bool = True):
        self.workdir, self.writes = workdir, writes
        self.path = workdir / "metrics.jsonl"
        self.evaluations = workdir / "evaluations"
        if not writes:
            return
        self.evaluations.mkdir(parents=True, exist_ok=True)
        (workdir / "samples").mkdir(exist_ok=True)
        for record in self.evaluations.glob("*.json"):
            if json.loads(record.read_text())["total_step"] > resumed_at:
                record.unlink()
        self._truncate(resumed_at)
        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def _truncate(self, resumed_at: int) -> None:
        """Keeps the lines of training up to `resumed_at` and of evaluations whose record is there."""
        kept = []
        for row in read_rows(self.path):
            done = self.record_path(row["stage_index"], row["stage"], row["step"]).exists()
            if row["total_step"] <= resumed_at and (row["kind"] == "train" or done):
                kept.append(json.dumps(row))
        write_text(self.path, "".join(line + "\n" for line in kept))

    def train(self, place: dict[str, Any], values: dict[str, float], timeline: Sequence[Span] = ()) -> None:
        """Appends the metrics of a step, and what its time went into. `place` holds stage, stage_index, step, total_step."""
        if self.writes:
            self._row("train", place, values, {TIMELINE: timeline})

    def record_path(self, stage_index: int, stage: str, step: int) -> Path:
        """Where the evaluation after `step` steps of a stage is recorded."""
        return self.evaluations / f"{stage_index}_{stage}_{step:07d}.json"

    def evaluation(self, place: dict[str, Any], result: dict[str, Any]) -> None:
        """Saves an evaluation: its pictures, its row, and last its record, whose presence says that it is complete."""
        if not self.writes:
            return
        name = f"{place['stage_index']}_{place['stage']}_{place['step']:07d}"
        for title, image in result.get("images", {}).items():
            image.save(self.workdir / "samples" / f"{name}_{title}.png")
            self.events.add_image(
                f"{place['stage']}/{title}", np.asarray(image), place["total_step"], dataformats="HWC"
            )
        metrics = {key: float(value) for key, value in result.get("metrics", {}).items()}
        scores = {key: _listed(value) for key, value in result.get("scores", {}).items()}
        self._row("evaluation", place, metrics)
        record = {**place, "metrics": metrics, "scores": scores}
        path = self.record_path(place["stage_index"], place["stage"], place["step"])
        write_text(path, json.dumps(record) + "\n")

    def _row(
        self, kind: str, place: dict[str, Any], values: dict[str, float], more: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        with self.path.open("a") as file:  # mounted buckets have what is closed
            file.write(json.dumps({"kind": kind, **place, **values, **more}) + "\n")
        for key, value in values.items():
            self.events.add_scalar(f"{place['stage']}/{key}", value, place["total_step"])

    def flush(self) -> None:
        """Writes what TensorBoard keeps for later, so that nothing is missing before the step of a checkpoint."""
        if self.writes:
            self.events.flush()

    def close(self) -> None:
        """Flushes everything."""
        if self.writes:
            self.events.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off while being written is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_evaluations(workdir: Path) -> list[dict[str, Any]]:
    """The evaluation records of a run in the order of their steps."""
    records = [json.loads(path.read_text()) for path in (workdir / "evaluations").glob("*.json")]
    return sorted(records, key=lambda r: (r["stage_index"], r["step"]))


def _listed(values: Any) -> list:
    """Scores as JSON: NaN, which JSON has not, becomes null."""
    array = np.asarray(values, np.float64)
    return np.where(np.isnan(array), None, array.astype(object)).tolist()
