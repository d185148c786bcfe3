"""Reproduces the paper's ablations of pre-training in the shapes world.

    python -m launch.reproduce --table=2 --scale=tiny --workdir=runs/ablations    # where the reference image goes
    python -m launch.reproduce --table=3 --scale=tiny --workdir=runs/ablations    # what is fine-tuned

Trains every variant with several seeds (configs/ablations.py) and writes tableN.md and tableN.png into the workdir. What is
there already is not trained again, and the same command goes on after an interruption; both tables share runs in one workdir.
Runs come one after the other, or `--jobs` at a time, each with its output in a file: two on two cores, one core each, take less
time than one on both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from absl import flags

from launch import cli

_TABLE = flags.DEFINE_enum("table", None, ["2", "3"], "Of the paper.")
_SCALE = flags.DEFINE_enum("scale", "tiny", ["tiny", "smoke"], "smoke: two steps of everything, to see that it works.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablations", "Folder of all runs and of the tables.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of every variant.", lower_bound=2)
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 1, "As for launch.train.", lower_bound=1)
flags.mark_flags_as_required(["table"])


def train(run: str, workdir: Path, seed: int) -> None:
    """One run by `launch.train`, in a process of its own, so that its memory is given back; nothing when it is done.

    Raises:
      RuntimeError: when it fails.
    """
    if (workdir / "export").is_dir():
        return
    arg = ",".join([run, str(workdir.parent), *(["smoke"] if _SCALE.value == "smoke" else [])])
    command = [sys.executable, "-m", "launch.train", f"--config=configs/ablations.py:{arg}", f"--config.seed={seed}"]
    command += [f"--workdir={workdir}", f"--cpu_devices={_CPU_DEVICES.value}"]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(f"{workdir.name}.log")
    print(f"{workdir.name}" + (f": {log}" if _JOBS.value > 1 else ":"), flush=True)
    with log.open("a") if _JOBS.value > 1 else nullcontext() as output:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], stdout=output, stderr=output)
    if done.returncode:
        raise RuntimeError(f"The run {workdir.name} ended with {done.returncode}; the same command goes on from there.")


def main(argv: list[str]) -> None:
    """Trains, then writes and prints the table."""
    del argv
    from unipic2_jax.evaluation.tables import TABLES, markdown, plot
    from unipic2_jax.training.metrics import read_evaluations

    number, folder = int(_TABLE.value), Path(os.path.abspath(_WORKDIR.value))
    table = TABLES[number]
    runs = [(row.variant, folder / f"{row.variant}-seed{n}", n) for row in table.rows for n in range(_SEEDS.value)]
    try:
        train("connector", folder / "connector", 0)
        with ThreadPoolExecutor(_JOBS.value) as pool:
            try:
                list(pool.map(lambda run: train(*run), runs))
            finally:
                pool.shutdown(cancel_futures=True)
    except RuntimeError as error:
        sys.exit(str(error))
    scores: dict[str, dict[str, list[float]]] = {}
    for variant, workdir, _ in runs:
        last = max(read_evaluations(workdir), key=lambda record: record["step"])
        for score in table.benchmarks.values():
            scores.setdefault(variant, {}).setdefault(score, []).append(last["metrics"][score])
    text = markdown(table, scores)
    (folder / f"table{number}.md").write_text(text)
    plot(table, scores, folder / f"table{number}.png")
    print(
        f"\n{table.title}: {_SEEDS.value} seeds, 95% t intervals\n\n{text}\nin {folder / f'table{number}.md'} and .png"
    )


if __name__ == "__main__":
    cli.run(main)
