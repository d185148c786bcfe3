"""Reproduces the paper's ablations of pre-training in the shapes world.

    python -m launch.reproduce --table=2 --scale=tiny --workdir=runs/ablations    # where the reference image goes
    python -m launch.reproduce --table=3 --scale=tiny --workdir=runs/ablations    # what is fine-tuned

Trains every variant with several seeds (configs/ablations.py), one after the other, and writes tableN.md and tableN.png into
the workdir. What is there already is not trained again, and the same command goes on after an interruption; both tables share
runs in one workdir.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from absl import flags

from launch import cli

_TABLE = flags.DEFINE_enum("table", None, ["2", "3"], "Of the paper.")
_SCALE = flags.DEFINE_enum("scale", "tiny", ["tiny", "smoke"], "smoke: two steps of everything, to see that it works.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablations", "Folder of all runs and of the tables.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of every variant.", lower_bound=2)
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 1, "As for launch.train.", lower_bound=1)
flags.mark_flags_as_required(["table"])


def train(run: str, workdir: Path, seed: int) -> None:
    """One run by `launch.train`, in a process of its own, so that its memory is given back; nothing when it is done."""
    if (workdir / "export").is_dir():
        return
    arg = ",".join([run, str(workdir.parent), *(["smoke"] if _SCALE.value == "smoke" else [])])
    command = [sys.executable, "-m", "launch.train", f"--config=configs/ablations.py:{arg}", f"--config.seed={seed}"]
    command += [f"--workdir={workdir}", f"--cpu_devices={_CPU_DEVICES.value}"]
    print(f"{workdir.name}:", flush=True)
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1])
    if done.returncode:
        sys.exit(f"The run {workdir.name} ended with {done.returncode}; the same command goes on from there.")


def main(argv: list[str]) -> None:
    """Trains, then writes and prints the table."""
    del argv
    from unipic2_jax.evaluation.tables import TABLES, markdown, plot
    from unipic2_jax.training.metrics import read_evaluations

    number, folder = int(_TABLE.value), Path(os.path.abspath(_WORKDIR.value))
    table = TABLES[number]
    train("connector", folder / "connector", 0)
    scores: dict[str, dict[str, list[float]]] = {}
    for row in table.rows:
        for seed in range(_SEEDS.value):
            name = f"{row.variant}-seed{seed}"
            train(row.variant, folder / name, seed)
            last = max(read_evaluations(folder / name), key=lambda record: record["step"])
            for score in table.benchmarks.values():
                scores.setdefault(row.variant, {}).setdefault(score, []).append(last["metrics"][score])
    text = markdown(table, scores)
    (folder / f"table{number}.md").write_text(text)
    plot(table, scores, folder / f"table{number}.png")
    print(
        f"\n{table.title}: {_SEEDS.value} seeds, 95% t intervals\n\n{text}\nin {folder / f'table{number}.md'} and .png"
    )


if __name__ == "__main__":
    cli.run(main)
