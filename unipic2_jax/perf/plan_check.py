"""Every full-size recipe compiled for the machines that it is meant for: what does not compile or fit is found before a machine is."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.perf import plan, plan_report, split
from unipic2_jax.perf.topology import GB, has_compiler, read_topology
from unipic2_jax.training.config import unplanned, validate

RECIPES = ("connector", "kontext", "unified", "unipic2", "pdtr")
GPUS = ("gpu:8xh100", "gpu:8xh200")
TPUS = ("v5e:8x8", "v5p:4x4x4", "v6e:8x8")
# The table that a person reads is written between these, in docs/scaling.md.
BEGIN, END = "<!-- made by launch.plan_check: begin -->", "<!-- made by launch.plan_check: end -->"


@dataclasses.dataclass(frozen=True)
class Checked:
    """A recipe on a machine.

    Attributes:
      row: of `plan_report.SUMMARY`, empty where there is none.
      details: Markdown of its own.
      problems: a sentence for everything that does not compile or fit.
      ratios: of every program, the class of `plan.CALIBRATION` and the compiled activations in parts of the counted ones.
    """

    recipe: str
    machine: str
    row: str = ""
    details: str = ""
    problems: tuple[str, ...] = ()
    ratios: tuple[tuple[str, float], ...] = ()


def machines() -> list[str]:
    """Those that can be compiled for here: GPUs, and TPUs where libtpu is installed.

    Raises:
      ConfigError: without the compiler for GPUs.
    """
    if not has_compiler(read_topology(GPUS[0])):
        raise ConfigError("The compiler for GPUs is missing; install it with `pip install -r requirements-cuda.txt`.")
    return [*GPUS, *(TPUS if importlib.util.find_spec("libtpu") else ())]


def check(recipe: str, machine: str, cache: str) -> Checked:
    """Compiles all programs of a recipe of `configs/`, split as `auto` would, for a machine."""
    log = lambda sentence: print(f"{recipe}: {sentence}", flush=True)
    topology = read_topology(machine)
    try:
        config = validate(importlib.import_module(f"configs.{recipe}").get_config())
        config = split.settled(config, topology, log)
        made = plan.plan(config, topology, cache=plan.Cache(cache), log=log)
        counted = plan.counted(config, topology, [config.parallel])[0]
        others = [s for s in split.priced(config, topology) if str(s) != split.described(config)][:3]
    except (ConfigError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return Checked(recipe, machine, problems=(f"{recipe} on {machine}: {reason}",))
    command = f"python -m launch.plan --config=configs/{recipe}.py --topology={machine}"
    parts = [
        f"## {recipe} on {machine}\n\n{topology.count} chips, {split.described(config)}, compiled:\n\n    {command}\n",
        plan_report.table(made.costs, topology),
        *(f"{sentence}\n" for sentence in plan_report.kernels(made)),
        "The next splits, by arithmetic: " + "; ".join(f"{other} ({other.figures()})" for other in others) + ".\n",
    ]
    advice = plan_report.advice(config, made.costs, topology)
    ratios = []
    for stage, rows in made.costs.items():
        for cost, guess in zip(rows, counted.costs[stage], strict=True):
            raw = guess.activations / plan.CALIBRATION[guess.calibrated] if guess.calibrated else 0.0
            if raw:
                ratios.append((guess.calibrated, cost.activations / raw))
    row = plan_report.summary(recipe, made.costs, topology, split.described(config))
    problems = tuple(f"{recipe} on {machine}: {sentence}" for sentence in advice)
    return Checked(recipe, machine, row, "\n".join([*parts, *advice]), problems, tuple(ratios))


def check_all(units: Sequence[tuple[str, str]], cache: str, jobs: int) -> Iterator[Checked]:
    """Recipes on machines, several at a time, in their order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(check, *zip(*units), [cache] * len(units))


def bounds() -> str:
    """What two nodes are to be better at than one, and what a chip holds between programs, by arithmetic as Markdown."""
    config = unplanned(validate(importlib.import_module("configs.pdtr").get_config()))
    lines, edits = [], []
    for machine in ("gpu:8xh100", "gpu:16xh100"):
        topology = read_topology(machine)
        splits = split.priced(config, topology)
        edits.append(splits[0].stages["edit"])
        lines += [f"PDTR on {machine}, by arithmetic:", "", *split.table(splits, topology), ""]
        whole = next(s for s in splits if s.parallel.fsdp == 1)
        lines += [
            f"With every parameter of the transformer on every chip, {whole.resident / GB:.1f} GB are resident.",
            "",
        ]
    lines.append(f"An editing step on 16 H100s takes {edits[1] / edits[0]:.2f} of the time on 8.")
    return "\n".join(lines)


def document(checked: Sequence[Checked], page: Path, tables: Path, bounded: Callable[[], str] = bounds) -> None:
    """Writes the table into `page`, between BEGIN and END, and all else into `tables`. What is there of other recipes and machines
    stays."""
    text = page.read_text()
    before, after = text.index(BEGIN), text.index(END)
    lines = [row for row in text[before:after].splitlines() if row.startswith("| ") and not row.startswith("| recipe")]
    rows = {tuple(row.strip("| ").split(" | ")[:2]): row for row in lines if row.strip("| ").split(" | ")[0] in RECIPES}
    old = tables.read_text() if tables.is_file() else ""
    sections = {tuple(part.split("\n", 1)[0].split(" on ")): f"## {part.strip()}\n" for part in old.split("\n## ")[1:]}
    for found in checked:
        unit = found.recipe, found.machine
        if found.row:
            rows[unit], sections[unit] = found.row, found.details
    order = [(recipe, machine) for machine in (*GPUS, *TPUS) for recipe in RECIPES]
    known = sorted(rows, key=lambda unit: order.index(unit) if unit in order else len(order))
    made = [BEGIN, "", plan_report.SUMMARY, *(rows[unit] for unit in known), "", bounded(), "", ""]
    page.write_text(text[:before] + "\n".join(made) + text[after:])
    head = "# The tables behind docs/scaling.md\n\n`make plan-check` makes this page; docs/scaling.md says what the columns are.\n"
    tables.write_text("\n".join([head, *(sections[unit] for unit in known)]))
