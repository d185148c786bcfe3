"""What an accelerator does with this project at full size: kernels, ratios, seconds, memory, in one report.

Everything is random: weights are made on the device, conditioning is arrays in the shape of the text encoders' results. A section is
written as soon as it is measured, so that a run which is cut short leaves what it has.
"""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from unipic2_jax.perf import accelerator_attention as kernels
from unipic2_jax.perf import bench
from unipic2_jax.perf.accelerator_programs import PROGRAMS, Check
from unipic2_jax.perf.bench import Ours
from unipic2_jax.perf.topology import GB

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "libtpu"),
    *("flax", "torch", "diffusers", "peft"),
)
# Of the time that is left, for the kernels alone.
ATTENTION_SHARE = 0.4
# PyTorch's weights, gradients and moments of a whole training step beside JAX's take more than 80 GB.
ROOM_FOR_BOTH = 100e9


class Report:
    """A Markdown file that holds at any time what has been measured so far."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.blocks = Path(path), []
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, block: str) -> None:
        """A block follows the ones before; rows of a table stay together."""
        row = block.startswith("|") and self.blocks and self.blocks[-1].startswith("|")
        self.blocks += [block] if row or not self.blocks else ["", block]
        self.path.write_text(str(self))

    def __str__(self) -> str:
        return "\n".join(self.blocks) + "\n"


def machine(check: Check) -> Iterator[str]:
    """Versions, device, memory."""
    yield "| | |\n|---|---|"
    limit, chip = check.memory("bytes_limit"), check.chip
    rows = {
        "device": f"{len(jax.devices())} x {check.device.device_kind} ({check.device.platform})",
        "memory of JAX's pool": "not counted by this device" if limit is None else f"{limit / GB:.1f} GB",
        "data sheet": "none"
        if chip is None
        else f"{chip.flops / 1e12:.0f} TFLOP/s in bfloat16, {chip.memory / GB:.0f} GB",
        "host": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {number}" for name in PACKAGES if (number := _version(name))),
        "commit": _commit() or "unknown: no git here",
    }
    for name, value in rows.items():
        yield f"| {name} | {value} |"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, where there is one."""
    run = lambda *line: subprocess.run(["git", *line], cwd=ROOT, capture_output=True, text=True)
    try:
        head, changed = run("rev-parse", "HEAD"), run("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + (", with changes" if changed.stdout.strip() else "")


def _cases(check: Check) -> list[kernels.Case]:
    settings = check.settings
    return kernels.find_cases(
        settings.size, check.size.metaquery, settings.height, settings.width, min(settings.batch, 4)
    )


def networks(check: Check) -> Iterator[str]:
    """Which attention each network gets."""
    yield from kernels.kernel_lines(_cases(check))


def attention(check: Check) -> Iterator[str]:
    """The device's kernel and XLA's attention against XLA in float32, in values, gradients and time."""
    chosen = list(dict.fromkeys((kernels.measured_kernel(), "xla")))
    cases = kernels.worth_measuring(_cases(check))
    yield (
        "Relative errors against XLA's attention in float32, on random arrays; of gradients the largest of query, key and value. "
        "Three of four keys are seen where there is a mask."
    )
    made = {(case, kernel): kernels.functions(case, kernel) for case in cases for kernel in chosen}
    found: dict[Any, Any] = {}
    jobs = []
    for case in cases:
        jobs += [((case, kernel, name), each) for kernel in chosen for name, each in made[case, kernel].items()]
        jobs.append(((case, "", "truth"), kernels.truth_function(case)))
    # What follows needs more time than this.
    ends = time.monotonic() + ATTENTION_SHARE * check.left()
    left = lambda: ends - time.monotonic()

    def compile_one(key: Any, function: Any) -> None:
        try:
            found[key] = function.trace(*kernels.describe(key[0])).lower().compile()
        except Exception as error:
            found[key] = error

    # As many at a time as there are cores: each holds a compiler's memory.
    waiting = iter(jobs)

    def worker() -> None:
        while left() > 0 and (job := next_job()) is not None:
            compile_one(*job)

    lock = threading.Lock()

    def next_job() -> Any:
        with lock:
            return next(waiting, None)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(left(), 1.0))
    check.log(f"{len(found)} of {len(jobs)} programs of attention compiled")
    yield kernels.outcome_heading(chosen)
    for case in cases:
        programs = {key[1:]: found.get(key) for key, _ in jobs if key[0] is case}
        if error := next((program for program in programs.values() if isinstance(program, Exception)), None):
            yield f"| {case.network} | {case.shape} | {check.fail('attention of ' + case.network, error)} |"
            continue
        if None in programs.values() or check.left() < 0:
            yield f"| {case.network} | {case.shape} | left out: there was no time |"
            continue
        arrays = kernels.draw(case)
        truth = programs["", "truth"](*arrays)
        outcomes = [
            kernels.outcome({name: programs[kernel, name] for name in made[case, kernel]}, arrays, truth)
            for kernel in chosen
        ]
        yield kernels.outcome_line(case, outcomes)
        for kernel, each in zip(chosen, outcomes):
            if not each.error <= kernels.TOLERANCE:
                why = f"its error {each.error:.1e} is above {kernels.TOLERANCE:.0e}"
                check.fail(f"attention by {kernel} of {case.network}, {case.shape}", why)


def on_policy(check: Check) -> Iterator[str]:
    """The first update after a rollout, in bfloat16 and micro-batches: nothing has changed, so that every ratio should be 1."""
    settings = check.settings
    check.build(check.programs)
    built = check.built("update")
    if reason := check.too_large("update"):
        yield f"Left out: the update {reason}."
        return
    arguments = built.work.arguments(check.inputs)
    _, metrics = jax.block_until_ready(built.compiled(*arguments))
    names = ("ratio_min", "ratio_max", "clip_fraction", "log_prob_difference", "log_prob_difference_max")
    yield (
        f"One update of {settings.batch} samples, {settings.micro_batch} at a time, on {settings.grpo.trained_steps} of "
        f"{settings.num_steps} stochastic steps, guidance {settings.guidance_scale}, clip range {settings.grpo.clip_range}, "
        f"{settings.dtype}, LoRA of rank {settings.lora_rank} that is not zero."
    )
    yield "| | |\n|---|---:|"
    for name in names:
        yield f"| {name} | {float(metrics[name]):.9g} |"
    yield f"| non_finite | {float(metrics['non_finite']):.0f} |"
    if float(metrics["non_finite"]):
        yield check.fail("the update", "its loss or gradient is not finite")


def speed(check: Check) -> Iterator[str]:
    """Seconds, model FLOP/s and memory of every program."""
    settings, steps = check.settings, check.size.steps
    check.build(PROGRAMS)
    yield (
        f"{settings.size}, {settings.height} x {settings.width} pixels, {settings.tokens} tokens of a picture and {settings.text_tokens} of "
        f"text, {settings.dtype}, remat {settings.remat}. `forward` and `flow` (all weights trained, AdamW) take {settings.batch} "
        f"samples; `rollout` and `update` as above. `t2i` and `edit` are one picture each, {steps} steps under guidance, the VAE "
        "included and text encoders left out. Seconds are medians after two warm-ups; MFU counts no recomputation. Memory is in GB, of "
        "everything on the device: measured (`<`: no more than programs before had), by the compiler, and as `launch.plan` counts it."
    )
    yield (
        "| program | seconds | model TFLOP | TFLOP/s | MFU | memory measured | by the compiler | counted | compiled in, s |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name in PROGRAMS:
        try:
            yield _speed_line(check, name)
        except TimeoutError as error:
            yield f"| {name} | left out: {error} |"
        except Exception as error:
            yield f"| {name} | {check.fail(name, error)} |"


def _speed_line(check: Check, name: str) -> str:
    built = check.built(name)
    if check.left() <= 0:
        raise TimeoutError("there was no time")
    if reason := check.too_large(name):
        return f"| {name} | left out: it {reason} |"
    before = check.memory("peak_bytes_in_use") or 0.0
    runner = built.work.runner(check.inputs, built.compiled)
    held = check.memory("bytes_in_use") or 0.0
    side = _Prepared({name: runner})
    row = bench.time_work(name, check.flops(name), [side], 3, check.settings.dtype)
    after = check.memory("peak_bytes_in_use")
    speed = row.flops / row.seconds[side.name]
    measured = "-" if after is None else f"{'' if after > before else '< '}{after / GB:.2f}"
    cells = [name, f"{row.seconds[side.name]:.4g}", f"{row.flops / 1e12:.4g}", f"{speed / 1e12:.3g}"]
    cells += [f"{speed / check.chip.flops:.1%}" if check.chip else "-", measured]
    cells += [f"{(held + built.said) / GB:.3g}", f"{(held + built.counted) / GB:.3g}", f"{built.seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


class _Prepared:
    """Our side, with runners of programs that are compiled."""

    name = Ours.name

    def __init__(self, runners: Mapping[str, bench.Runner]):
        self.runners = runners

    def runner(self, work: str) -> bench.Runner:
        """The runner of a work."""
        return self.runners[work]


def pytorch(check: Check) -> Iterator[str]:
    """The same works in PyTorch: diffusers' transformer with SDPA, as it is and through torch.compile."""
    device, why = bench.torch_device(check.device.platform)
    if device is None:
        yield f"Not measured: {why}."
        return
    from unipic2_jax.perf.bench_torch import Theirs

    works = ["forward", "update", "rollout"]
    limit = check.memory("bytes_limit")
    if limit is None or limit > ROOM_FOR_BOTH:
        works.append("flow")
    else:
        yield "The flow step is left out: both sides' moments do not fit beside each other."
    check.build(works)
    # Inductor compiles for minutes on a few cores, where there is nothing to learn from it.
    kinds = (False,) if device == "cpu" else (False, True)
    sides = [Theirs(check.settings, check.inputs, device, compiled) for compiled in kinds]
    names = [Ours.name, *(side.name for side in sides)]
    yield f"{why[0].upper()}{why[1:]}, blocks with SDPA. The last columns are above 1 where JAX is faster."
    yield bench.heading(names, check.chip)
    for work in works:
        if check.left() <= 0:
            yield f"| {work} | left out: there was no time |"
            continue
        try:
            built = check.built(work)
            ours = _Prepared({work: built.work.runner(check.inputs, built.compiled)})
            row = bench.time_work(work, check.flops(work), [ours, *sides], 1, check.settings.dtype)
            yield bench.line(row, check.chip)
        except TimeoutError as error:
            yield f"| {work} | left out: {error} |"
        except Exception as error:
            yield f"| {work} | {check.fail(f'{work} beside PyTorch', error)} |"


SECTIONS: dict[str, tuple[str, Callable[[Check], Iterator[str]]]] = {
    "machine": ("The machine", machine),
    "kernels": ("Which attention runs", networks),
    "attention": ("Attention: the kernel against XLA", attention),
    "on_policy": ("Ratios on-policy", on_policy),
    "speed": ("Seconds and memory", speed),
    "pytorch": ("Beside PyTorch", pytorch),
}


def run(check: Check, report: Report, only: Sequence[str], command: str) -> bool:
    """Every section in turn.

    Args:
      only: names of SECTIONS.
      command: what was typed, for the report.

    Returns:
      Whether none failed.
    """
    report.add(f"# {check.device.device_kind}")
    report.add(f"    {command}")
    for name in only:
        title, section = SECTIONS[name]
        started = time.monotonic()
        check.log(f"{title} ({check.left():.0f} s left)")
        report.add(f"## {title}")
        if check.left() <= 0:
            report.add("Left out: there was no time.")
            continue
        try:
            for block in section(check):
                report.add(block)
        except TimeoutError as error:
            report.add(f"Left out: {error}.")
        except Exception as error:  # the other sections are measured all the same
            report.add(check.fail(title, error))
        check.log(f"{title}: {time.monotonic() - started:.0f} s")
    failed = ", ".join(check.failures)
    report.add(f"Failed: {failed}." if failed else "Nothing failed.")
    return not failed
