"""What a compiled program moves through memory and over links, read from its text; loops count by their turns."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "from other slices"
BETWEEN_NODES = " between nodes"  # behind a kind of collective
BITS = {"pred": 8, "bf16": 16, "token": 0}
# What names or groups values and moves none.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("iota", "partition-id", "replica-id", "opt-barrier"),
}
UNPAID = ("AllocateBuffer", "ConcatBitcast")  # "kernels" of TPUs
# What reads a part of its first operand.
SLICES = ("slice", "dynamic-slice", "gather")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\bS\([1-4]\)[^}]*\})?")
# What a kernel of a library returns beside its results: room that it was given to work in.
_WORKSPACE = re.compile(r", [su]8\[\d+\](?:\{[^}]*\})?(?=\))")
_NAME = re.compile(r"%([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The devices of a collective: listed, or the rows of an array of all of them, transposed or not.
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_ROWS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program.

    Attributes:
      sizes: bytes of each array that it makes, several for a tuple.
      stored: of these the bytes in memory, 0 for arrays that a TPU keeps on its chip.
      rest: of the line, with its attributes.
    """

    name: str
    op: str
    sizes: tuple[int, ...]
    stored: tuple[int, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def size(self) -> int:
        """Bytes of all that it makes."""
        return sum(self.sizes)

    @property
    def called_kernel(self) -> str:
        """The name of the library's kernel that it calls; empty where it calls none."""
        target = _TARGET.search(self.rest) if self.op == "custom-call" else None
        return target[1] if target else ""

    def called(self, attribute: str) -> list[str]:
        """Computations that an attribute names."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return _NAME.findall(match[1]) if match else []

    def groups(self) -> list[list[int]]:
        """The devices that a collective joins, group by group; none where all of them are one group."""
        if match := _LISTED.search(self.rest):
            return [list(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", match[1])]
        if match := _ROWS.search(self.rest):
            shape, source, order = (tuple(map(int, x.split(","))) if x else None for x in match.groups())
            devices = np.arange(math.prod(source)).reshape(source)
            return devices.transpose(order or range(len(source))).reshape(shape[0], -1).tolist()
        return []


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: instructions by computation, and how often each computation runs in a call."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    @classmethod
    def read(cls, text: str) -> Module:
        """From `compiled.as_text()`.

        Raises:
          ValueError: when it has no entry.
        """
        computations: dict[str, dict[str, Instruction]] = {}
        entry, computation = None, {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                computation = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
            elif match := _INSTRUCTION.match(line):
                operands, _, rest = match[4].partition(")")
                # Of a parameter the parentheses hold its number, of a constant its value.
                named = match[3] not in ("parameter", "constant")
                names = tuple(_NAME.findall(operands)) if named else (operands,)
                shape = _WORKSPACE.sub("", match[2]) if match[3] == "custom-call" else match[2]
                computation[match[1]] = Instruction(match[1], match[3], *_sizes(shape), names, rest)
        if entry is None:
            raise ValueError("The text of the compiled program has no entry.")
        return cls(computations, entry)

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """Computation -> how often it runs, of those that are not part of a fused one. All branches of a choice count."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                if instruction.op == "while":
                    for body in instruction.called("body"):
                        visit(body, times * self._turns(instruction))
                elif instruction.op in ("call", "async-start"):
                    for called in instruction.called("to_apply") + instruction.called("calls"):
                        visit(called, times)
                elif instruction.op == "conditional":
                    for called in instruction.called("branch_computations"):
                        visit(called, times)

        visit(self.entry, 1)
        return counts

    def _turns(self, loop: Instruction) -> int:
        """How often a loop's body runs: as the compiler says, or up to the one number that its condition knows; else 1."""
        if turns := _TURNS.search(loop.rest):
            return int(turns[1])
        limits = {
            int(line.operands[0])
            for name in loop.called("condition")
            for line in self.computations[name].values()
            if line.op == "constant" and line.operands[0].isdigit()
        }
        return limits.pop() if len(limits) == 1 else 1

    def running(self) -> Iterator[tuple[Mapping[str, Instruction], Instruction, int]]:
        """Every instruction outside of fusions, with its computation and how often that runs."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield self.computations[name], instruction, times

    def kernels(self) -> dict[str, int]:
        """Names of the kernels of libraries that the program calls, and in how many places it does."""
        counts: dict[str, int] = {}
        for _, instruction, _ in self.running():
            if name := instruction.called_kernel:
                counts[name] = counts.get(name, 0) + 1
        return counts

    def port_bytes(self, nodes: Sequence[int]) -> float:
        """Bytes that a device's own port to the network passes, if the members of a group that are in one node share what
        crosses between nodes; `nodes` has the node of each device."""
        total = 0.0
        for _, size, instruction in self._collectives():
            if members := _crossing(instruction, nodes):
                total += size / members
        return total

    def collective_bytes(self, nodes: Sequence[int] = ()) -> dict[str, int]:
        """Bytes that a device receives, by kind of collective: an all-reduce passes what it reduces around twice.

        On TPUs a collective may be part of a fusion; a sum of which a device keeps a part is a reduce-scatter there. What comes
        from other slices comes through the hosts. Kinds whose groups reach over several of `nodes` have names of their own.
        """
        received: dict[str, int] = {}
        for kind, size, instruction in self._collectives():
            name = kind + (BETWEEN_NODES if _crossing(instruction, nodes) else "")
            received[name] = received.get(name, 0) + size
        return received

    def _collectives(self) -> Iterator[tuple[str, int, Instruction]]:
        """Kind, bytes that a device receives in all of the program's turns, and the instruction."""
        for computation, instruction, times in self.running():
            inside = {}
            if instruction.op == "fusion":
                inside = self.computations[instruction.called("calls")[0]]
            for scope, line in [(computation, instruction), *((inside, line) for line in inside.values())]:
                kind = line.op.removesuffix("-start")
                if kind == "recv" and "is_host_transfer=true" in line.rest:
                    yield BETWEEN_SLICES, times * max(line.sizes), line
                if kind not in COLLECTIVES:
                    continue
                given = sum(scope[name].size for name in line.operands if name in scope)
                most = max(given, max(line.sizes, default=0))
                if kind == "all-reduce" and inside and instruction.size < most:
                    kind = "reduce-scatter"
                yield kind, times * most * (2 if kind == "all-reduce" else 1), line

    def moved_bytes(self) -> int:
        """Bytes that are read from and written to memory, if every instruction reads and writes its arrays once.

        Of an array that is sliced or updated in place the slice counts alone.
        """
        return sum(times * self.moved(computation, instruction) for computation, instruction, times in self.running())

    def moved(self, computation: Mapping[str, Instruction], instruction: Instruction) -> int:
        """Bytes of one instruction in one of its turns, see `moved_bytes`."""
        if instruction.op in FREE or instruction.op.endswith("-done") or instruction.called_kernel in UNPAID:
            return 0
        sizes = [sum(computation[name].stored) if name in computation else 0 for name in instruction.operands]
        written = sum(instruction.stored)
        if instruction.op == "copy-start":  # it gives its result, then its operand again
            return sum(instruction.stored[:2])
        if instruction.op == "slice-start":  # it gives its operand again, then its result
            (source, result), size = instruction.stored[:2], instruction.sizes[1]
            return (size if source else 0) + result
        if instruction.op in SLICES:
            return written + min(sizes[0], instruction.size)
        if instruction.op == "dynamic-update-slice":
            return 2 * sizes[1]
        if instruction.op != "fusion":
            return written + sum(sizes)
        inside = self.computations[instruction.called("calls")[0]]
        for update in inside.values():
            # An array that is updated in place comes in and goes out, and all but the update stays where it is.
            if (
                update.op == "dynamic-update-slice"
                and self._is_parameter(inside, update.operands[0])
                and any(update.stored)
            ):
                written += inside[update.operands[1]].size - update.size
        return max(written, 0) + sum(self._read(inside, number, size) for number, size in enumerate(sizes))

    def _is_parameter(self, inside: Mapping[str, Instruction], name: str) -> bool:
        while inside[name].op == "bitcast":
            name = inside[name].operands[0]
        return inside[name].op == "parameter"

    def _read(self, inside: Mapping[str, Instruction], number: int, size: int) -> int:
        """Bytes that a fusion reads of the argument of this number, which has `size`: of one that it only slices, the slices."""
        names = [line.name for line in inside.values() if line.op == "parameter" and int(line.operands[0]) == number]
        read = 0
        while names:
            name = names.pop()
            for line in inside.values():
                for place in (place for place, operand in enumerate(line.operands) if operand == name):
                    if line.op == "bitcast":
                        names.append(line.name)
                    elif line.op in SLICES and place == 0:
                        read += line.size
                    elif line.op == "fusion":
                        read += self._read(self.computations[line.called("calls")[0]], place, size)
                    elif line.op != "dynamic-update-slice" or place != 0:
                        return size
        return min(read, size)


def _crossing(collective: Instruction, nodes: Sequence[int]) -> int:
    """How many devices of one node are in a group of a collective that reaches over several nodes; 0: none does."""
    if len(set(nodes)) < 2:
        return 0
    groups = collective.groups() or [list(range(len(nodes)))]
    over = [group for group in groups if len({nodes[device] for device in group}) > 1]
    return min((min(collections.Counter(nodes[device] for device in group).values()) for group in over), default=0)


def _sizes(shape: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of every array of a shape, and those of them that are in memory."""
    arrays = _ARRAY.findall(shape)
    sizes = tuple(_array_bytes(kind, axes) for kind, axes, _ in arrays)
    return sizes, tuple(0 if on_chip else size for size, (*_, on_chip) in zip(sizes, arrays))


def _array_bytes(kind: str, axes: str) -> int:
    bits = BITS.get(kind)
    if bits is None:
        digits = re.search(r"\d+", kind)
        bits = int(digits[0]) if digits else 0
    return math.prod(int(n) for n in axes.split(",") if n) * bits // 8
