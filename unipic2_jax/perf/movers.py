"""What moves a compiled program's bytes: kinds of instructions, the pass that they belong to, and the layer that asked for them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from unipic2_jax.perf.hlo import COLLECTIVES, Instruction, Module

KINDS = ("products", "attention", "layers of a stack", "copies", "sums", "element-wise", "collectives")
ATTENTION = ("__cudnn$fmha", "tpu_custom_call")  # kernels; splash attention is the one Pallas kernel here
PASSES = ("forward", "backward", "recomputed")
# What gives other places to numbers and computes none.
PLACING = {
    *("copy", "transpose", "reshape", "slice", "concatenate", "pad", "reverse", "broadcast", "gather", "copy-start"),
    *("dynamic-slice", "dynamic-update-slice", "slice-start"),
}
# Where an element comes from, and its format.
ADDRESSES = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "iota",
    "compare",
    "select",
    "convert",
    "fusion",
}
_NAME = re.compile(r'op_name="([^"]*)"')
# Of a name what JAX adds to the modules' own: loops, calls, and functions of its own.
_SCAFFOLD = re.compile(
    r"^(while|body|cond|closed_call|checkpoint|rematted_computation|scan|remat\d*|pjit|branch_\d+_fun|jit\(.*\))$"
)
_WRAPPED = re.compile(r"^(?:jvp|transpose|vmap)\((.*)\)$")
# A layer's weights, or what it keeps for the backward pass, taken from the arrays of all layers or put there.
_STACK = re.compile(r"dynamic_(?:update_)?(?:slice|index_in_dim)\)?(?:/dynamic_(?:update_)?slice|/squeeze)?$")


class Mover(NamedTuple):
    """Instructions of one kind in one place: where in the model, in which pass, and the bytes that they read and write."""

    kind: str
    phase: str
    where: str
    moved: int


def movers(module: Module) -> list[Mover]:
    """All of a program's moved bytes (`Module.moved_bytes`), the largest first.

    `kind` is one of KINDS: a fusion with a product counts as the product, else by the most that is in it. `phase` is one of PASSES:
    'forward' is every evaluation that keeps nothing too, the reference policy's for instance.
    """
    totals: Counter[tuple[str, str, str]] = Counter()
    for computation, instruction, times in module.running():
        if moved := times * module.moved(computation, instruction):
            name = _NAME.search(instruction.rest)
            path = name[1] if name else ""
            totals[_kind(module, instruction, path), _phase(path), _where(path) or instruction.op] += moved
    return [Mover(*place, moved) for place, moved in totals.most_common()]


def by(found: Sequence[Mover], *fields: str) -> list[tuple[tuple[str, ...], int]]:
    """Sums over movers that agree in these fields, the largest first."""
    totals: Counter[tuple[str, ...]] = Counter()
    for mover in found:
        totals[tuple(getattr(mover, field) for field in fields)] += mover.moved
    return totals.most_common()


def table(found: Sequence[Mover], count: int) -> str:
    """Three tables in Markdown: bytes by kind, by kind and pass, and the `count` largest movers; TB (10^12 bytes) and shares."""
    whole = sum(mover.moved for mover in found)
    cells = lambda moved: f"{moved / 1e12:.3f} | {moved / whole:.1%} |"
    kinds = [f"| {kind} | {cells(moved)}" for (kind,), moved in by(found, "kind")]
    passes = [f"| {kind}, {phase} | {cells(moved)}" for (kind, phase), moved in by(found, "kind", "phase")]
    rows = [f"| {m.kind} | {m.phase} | {m.where} | {cells(m.moved)}" for m in found[:count]]
    short = "| {} | TB | of all |\n|---|---:|---:|"
    return "\n".join(
        [
            *(short.format("kind"), *kinds, f"| all | {cells(whole)}", ""),
            *(short.format("kind and pass"), *passes, ""),
            *("| kind | pass | where | TB | of all |\n|---|---|---|---:|---:|", *rows, ""),
        ]
    )


def _kind(module: Module, instruction: Instruction, path: str) -> str:
    if instruction.op.removesuffix("-start") in COLLECTIVES:
        return "collectives"
    if instruction.called_kernel.startswith(ATTENTION):
        return "attention"
    inside = set(_inside(module, instruction)) if instruction.op == "fusion" else {instruction.op}
    if inside & {"dot", "convolution"} or instruction.called_kernel.startswith("__cublas"):
        return "products"
    if inside & {"reduce", "reduce-window"}:
        return "sums"
    if _STACK.search(path):
        return "layers of a stack"
    if inside & PLACING and inside <= PLACING | ADDRESSES:
        return "copies"
    return "element-wise"


def _inside(module: Module, fusion: Instruction) -> Counter[str]:
    """Operations of a fusion, and of those within it."""
    found: Counter[str] = Counter()
    for name in fusion.called("calls"):
        for line in module.computations[name].values():
            found[line.op] += 1
            if line.op == "fusion":
                found += _inside(module, line)
    return found


def _phase(path: str) -> str:
    if "rematted_computation" in path:
        return "recomputed"
    return "backward" if "transpose(" in path else "forward"


def _where(path: str) -> str:
    """The modules that asked for it and the last operation: 'dual_blocks/attn/to_q/dot_general'."""
    parts = []
    for part in path.split("/"):
        while wrapped := _WRAPPED.match(part):
            part = wrapped[1]
        if part and not _SCAFFOLD.match(part):
            parts.append(part)
    return "/".join(parts[-4:])
