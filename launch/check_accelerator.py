"""Checks and measures this project on the GPU or TPU of this machine, and writes what it finds into one Markdown report.

    python -m launch.check_accelerator
    python -m launch.check_accelerator --only=machine,kernels,attention
    python -m launch.check_accelerator --size=tiny

Nothing is downloaded: weights and conditioning are random. Every section is written when it is measured, and one that fails says so
there; the exit code is then 1. Beside it stands PyTorch where `torch`, `diffusers` and `peft` are installed.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading

from absl import flags

from launch import cli

SECTIONS = ("machine", "kernels", "attention", "on_policy", "speed", "pytorch")

SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "Of the networks: SD3.5-Medium's, or tiny ones for a CPU.")
OUT = flags.DEFINE_string("out", "accelerator.md", "Report to write.")
ONLY = flags.DEFINE_list("only", list(SECTIONS), f"Sections: {', '.join(SECTIONS)}.")
BUDGET = flags.DEFINE_float("budget_s", 450.0, "Seconds after which nothing new is begun.", lower_bound=0.0)
BATCH = flags.DEFINE_integer("batch", None, "Samples of a step, instead of the size's own.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Writes and prints the report."""
    del argv
    if unknown := [name for name in ONLY.value if name not in SECTIONS]:
        raise ValueError(f"There is no section '{unknown[0]}'; choose from {', '.join(SECTIONS)}.")
    # PyTorch needs memory too; before JAX is imported.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from unipic2_jax.perf import accelerator
    from unipic2_jax.perf.accelerator_programs import PROGRAMS, Check

    log = lambda line: print(line, file=sys.stderr, flush=True)
    programs = PROGRAMS if "speed" in ONLY.value else ("rollout", "update")
    check = Check(SIZE.value, BATCH.value, BUDGET.value, log, programs)
    report = accelerator.Report(OUT.value)
    command = shlex.join(["python", "-m", "launch.check_accelerator", *sys.argv[1:]])
    right = accelerator.run(check, report, ONLY.value, command)
    print(report, end="", flush=True)
    if threading.active_count() > 1:  # a compiler that nothing can stop, and that crashes when Python ends under it
        os._exit(not right)
    if not right:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
