"""Reproduces the paper's ablations in the shapes world.

    python -m launch.reproduce --table=2 --scale=tiny --workdir=runs/ablations    # where the reference image goes
    python -m launch.reproduce --table=3 --scale=tiny --workdir=runs/ablations    # what is fine-tuned
    python -m launch.reproduce --table=4 --scale=tiny --workdir=runs/table4       # what is rewarded

Trains every variant with several seeds (configs/ablations.py) and writes tableN.md and tableN.png into the workdir; for table 4
also the curves of the rewards and what the models draw. What is there already is not trained again, and the same command goes
on after an interruption; tables share runs in one workdir.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from absl import flags

from configs.ablations import REINFORCED, SHARED, run_before
from launch import cli

_TABLE = flags.DEFINE_enum("table", None, ["2", "3", "4"], "Of the paper.")
_SCALE = flags.DEFINE_enum("scale", "tiny", ["tiny", "smoke"], "smoke: two steps of everything, to see that it works.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablations", "Folder of all runs and of the tables.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of every variant.", lower_bound=2)
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 1, "As for launch.train; runs at the same time share them.", lower_bound=1
)
flags.mark_flags_as_required(["table"])


def words(run: str, folder: Path) -> str:
    """The argument of configs/ablations.py for a run."""
    return ",".join([run, str(folder), *(["smoke"] if _SCALE.value == "smoke" else [])])


def folder_of(run: str, folder: Path, seed: int) -> Path:
    """Where a run is."""
    return folder / (run if run == SHARED else f"{run}-seed{seed}")


def waves(variants: Sequence[str], folder: Path, seeds: int) -> list[list[tuple[str, Path, int]]]:
    """Arguments of `train` for these variants and all that they go on from: what can be done at the same time, in order."""
    needed = set(variants)
    while missing := {before for run in needed if (before := run_before(run))} - needed:
        needed |= missing
    depth = lambda run: 0 if (before := run_before(run)) is None else 1 + depth(before)
    rows: list[list[tuple[str, Path, int]]] = [[] for _ in range(1 + max(map(depth, needed)))]
    for run in sorted(needed):
        run_seeds = [0] if run == SHARED else range(seeds)
        rows[depth(run)] += [(run, folder_of(run, folder, seed), seed) for seed in run_seeds]
    return rows


def train(run: str, workdir: Path, seed: int, cores: set[int] | None = None) -> None:
    """One run by `launch.train`, in a process of its own, so that its memory is given back; nothing when it is done.

    Args:
      cores: of a run beside others, those that it may use, or none where that cannot be said; None: the run is alone.

    Raises:
      ConfigError: what is done is another run, as one of another scale.
      RuntimeError: when it fails.
    """
    changes: dict[str, Any] = {"seed": seed}
    if run in REINFORCED and (before := run_before(run)):
        changes["init"] = str(folder_of(before, workdir.parent, seed) / "export")
    if (workdir / "export").is_dir():
        from configs.ablations import get_config
        from unipic2_jax.training.config import check_same_run, validate

        config = get_config(words(run, workdir.parent))
        config.update(changes)
        check_same_run(validate(config), workdir / "config.json")
        return
    command = [sys.executable, "-m", "launch.train", f"--config=configs/ablations.py:{words(run, workdir.parent)}"]
    command += [f"--config.{name}={value}" for name, value in changes.items()]
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
    from unipic2_jax.reproduction.runs import draw_rewards, read_scores
    from unipic2_jax.reproduction.tables import BASE, TABLES, markdown, plot

    number, folder = int(_TABLE.value), Path(os.path.abspath(_WORKDIR.value))
    table, seeds = TABLES[number], range(_SEEDS.value)
    variants = [row.variant for row in table.rows if row.variant != BASE]
    try:
        for wave in waves(variants, folder, len(seeds)):
            train_all(wave, _JOBS.value)
    except RuntimeError as error:
        sys.exit(str(error))
    runs = {variant: [folder_of(variant, folder, seed) for seed in seeds] for variant in variants}
    # What all started from was measured before the first step.
    first = next((variant for variant in variants if run_before(variant) is None), None)
    scores = read_scores(table, {**runs, **({BASE: runs[first]} if first else {})})
    text = markdown(table, scores)
    (folder / f"table{number}.md").write_text(text)
    plot(table, scores, folder / f"table{number}.png")
    if first:
        draw_rewards(table, runs, folder / f"table{number}_rewards.png")
        samples(first, {BASE: None, **{v: runs[v][0] / "export" for v in variants}}, folder, f"table{number}_samples")
    print(f"\n{table.title}: {len(seeds)} seeds, 95% t intervals\n\n{text}\nin {folder / f'table{number}.md'} and .png")


def samples(run: str, models: dict[str, Path | None], folder: Path, name: str) -> None:
    """What all models make of the same held-out prompts, a sheet for each task."""
    from configs.ablations import get_config
    from unipic2_jax.reproduction.runs import draw_samples
    from unipic2_jax.training.config import validate
    from unipic2_jax.training.setup import config_mesh

    config = validate(get_config(words(run, folder)))
    folders = {caption: model or config.init for caption, model in models.items()}
    for task, fields in config.stages[config.schedule[0]].evaluations.items():
        draw_samples(config, folders, fields, config_mesh(config)).save(folder / f"{name}_{task}.png")


if __name__ == "__main__":
    cli.run(main)
