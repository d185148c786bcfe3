"""Reproduces the paper's ablations of pre-training in the shapes world.

    python -m launch.reproduce --table=2 --scale=tiny --workdir=runs/ablations    # where the reference image goes
    python -m launch.reproduce --table=3 --scale=tiny --workdir=runs/ablations    # what is fine-tuned

Trains every variant with several seeds (configs/ablations.py) and writes tableN.md and tableN.png into the workdir. What is
there already is not trained again, and the same command goes on after an interruption; both tables share runs in one workdir.
Runs come one after the other, or `--jobs` at a time, each with its output in a file and its share of the cores: two on two cores
take less time than one on both.
"""

from __future__ import annotations

import functools
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path

from absl import flags

from launch import cli

_TABLE = flags.DEFINE_enum("table", None, ["2", "3"], "Of the paper.")
_SCALE = flags.DEFINE_enum("scale", "tiny", ["tiny", "smoke"], "smoke: two steps of everything, to see that it works.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablations", "Folder of all runs and of the tables.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of every variant.", lower_bound=2)
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 1, "As for launch.train; runs at the same time share them.", lower_bound=1
)
flags.mark_flags_as_required(["table"])


def train(run: str, workdir: Path, seed: int, cores: set[int] | None = None) -> None:
    """One run by `launch.train`, in a process of its own, so that its memory is given back; nothing when it is done.

    Args:
      cores: of a run beside others, those that it may use, or none where that cannot be said; None: the run is alone.

    Raises:
      RuntimeError: when it fails.
    """
    if (workdir / "export").is_dir():
        return
    arg = ",".join([run, str(workdir.parent), *(["smoke"] if _SCALE.value == "smoke" else [])])
    command = [sys.executable, "-m", "launch.train", f"--config=configs/ablations.py:{arg}", f"--config.seed={seed}"]
    devices = _CPU_DEVICES.value if cores is None else max(1, _CPU_DEVICES.value // _JOBS.value)
    command += [f"--workdir={workdir}", f"--cpu_devices={devices}"]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(f"{workdir.name}.log")
    print(f"{workdir.name}" + (f": {log}" if _JOBS.value > 1 else ":"), flush=True)
    with log.open("a") if _JOBS.value > 1 else nullcontext() as output:
        limit = functools.partial(os.sched_setaffinity, 0, cores) if cores else None
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, cwd=root, stdout=output, stderr=output, preexec_fn=limit)
    if done.returncode:
        raise RuntimeError(f"The run {workdir.name} ended with {done.returncode}; the same command goes on from there.")


def train_all(runs: list[tuple[str, Path, int]], jobs: int) -> None:
    """Arguments of `train`, `jobs` at a time. After a failure nothing new is started."""
    cores = sorted(os.sched_getaffinity(0)) if jobs > 1 and hasattr(os, "sched_getaffinity") else []
    free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for job in range(jobs):
        free.put(set(cores[job::jobs]))

    failed = threading.Event()

    def on_its_cores(run: tuple[str, Path, int]) -> None:
        own = free.get()
        try:
            if not failed.is_set():
                train(*run, own)
        except BaseException:
            failed.set()
            raise
        finally:
            free.put(own)

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(on_its_cores, run) for run in runs]):
            done.result()


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
        train_all(runs, _JOBS.value)
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
