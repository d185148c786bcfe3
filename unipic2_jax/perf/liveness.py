"""What a program holds at once and moves, by arithmetic on its jaxpr: for chips whose compiler needs the chip.

The program is traced for one chip's rows. Its values live from where they are made to their last use; what is computed element
by element is made where it is used (compilers fuse it) unless several others use it and it depends on several large arrays.
A loop holds its results and carried values, and its body's at the worst moment. Arguments and results are not counted here:
they are known exactly. Matrices that are split over chips are gathered where a product takes them, and given up after the last
product of the same turn. Attention's logits [.., Q, K] are not held where a flash kernel takes them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unipic2_jax.parallel.compat import core
from unipic2_jax.perf.counting import inner_jaxprs

# Primitives whose one jaxpr runs once, on their arguments.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
# What only gives an array another shape or name.
VIEWS = {
    *("reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p", "stop_gradient", "sharding_constraint"),
    "optimization_barrier",
}
LOOPS = {"scan", "while", "cond"}
PRODUCTS = {"dot_general", "conv_general_dilated"}
# What reads its operands from memory and writes its results there, beside loops.
KERNELS = {
    *PRODUCTS,
    *("gather", "scatter", "scatter-add", "scatter_add", "sort", "argmax", "argmin", "cumsum", "dynamic_update_slice"),
    *("random_bits", "random_split", "random_fold_in", "top_k", "reduce_window", "select_and_scatter_add"),
    # Attention, where the chip is there and has a kernel.
    *("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper", "pallas_call"),
}
LARGE = 4  # an array depends on others of at least this part of its size
FLASH_CHANNELS = 256  # of a head, at most


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip holds and moves, in bytes.

    Attributes:
      held: at the worst moment, beside arguments and results.
      moved: to and from memory.
      gathered: of split parameters, from all chips.
      results: of what is returned and has no argument's place.
      logits: whether logits of attention are among what is held.
    """

    held: float = 0.0
    moved: float = 0.0
    gathered: float = 0.0
    results: float = 0.0
    logits: bool = False


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter, or a part or a cast of one; `share` is the part of it that a chip has."""

    name: int
    share: float


@dataclasses.dataclass(eq=False)
class Value:
    """An array on a chip.

    Attributes:
      size: bytes that the chip has of it.
      given: an argument, which takes no memory here.
    """

    size: float
    given: bool = False
    weight: Weight | None = None

    @property
    def whole(self) -> float:
        """Bytes of all chips' parts: what a compiler fuses does not depend on how parameters are split."""
        return self.size if self.weight is None else self.size / self.weight.share


@dataclasses.dataclass(eq=False)
class Operation:
    """An equation, with its arrays; literals are left out.

    Attributes:
      sliced, stacked: of a scan, how many of its arguments and of its results have an axis for the turns.
    """

    name: str
    params: Mapping[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    sliced: int = 0
    stacked: int = 0

    @property
    def fuses(self) -> bool:
        """Whether a compiler makes it part of what uses or makes its arrays."""
        return self.name not in KERNELS and self.name not in LOOPS

    @property
    def reduces(self) -> bool:
        """Whether it makes little of much: its operands fuse into it, its results are in memory."""
        return self.name.startswith("reduce_")


def measure(
    traced: jax.stages.Traced,
    weights: Sequence[float | None],
    flash: bool = False,
    trained: Sequence[bool] | None = None,
) -> Work:
    """Work of a function for one chip.

    Args:
      traced: of `jax.jit(...).trace`, for the rows of one chip.
      weights: for each array among the arguments the part of it that a chip has where it is a parameter or is split like one
        (as moments are), else None.
      flash: whether attention in 16 bits is a kernel that does not hold its logits.
      trained: for each of these arrays whether the program makes others like it, its gradient and moments, which are then known
        by its shape; None: all.
    """
    closed = traced.jaxpr
    shares = {
        var.aval.shape: share
        for var, share, alike in zip(closed.jaxpr.invars, weights, trained or [True] * len(weights), strict=True)
        if alike and share is not None and share < 1 and len(var.aval.shape) > 1
    }
    every, narrow = (frozenset(_logits(closed.jaxpr, channels)) for channels in (math.inf, FLASH_CHANNELS))
    unheld = narrow if flash else frozenset()
    counter = _Counter(shares, unheld)
    given = []
    for number, (var, share) in enumerate(zip(closed.jaxpr.invars, weights, strict=True)):
        size = counter.size(var.aval) if share is None else whole_size(var.aval) * share
        given.append(Value(size, True, None if share is None else Weight(number, share)))
    consts = [Value(float(np.asarray(const).nbytes), True) for const in closed.consts]
    work = counter.of(closed.jaxpr, consts, given, results_given=True)
    donated = (info.donated for info in jax.tree.leaves(traced.args_info))
    kept = sum(counter.size(aval) for aval in closed.out_avals)
    kept -= sum(value.size for value, gone in zip(given, donated, strict=True) if gone)
    return dataclasses.replace(work, results=max(kept, 0.0), logits=every > unheld)


def _logits(jaxpr: core.Jaxpr, most: float) -> Iterable[tuple[int, ...]]:
    """Shapes of what a flash kernel keeps on its chip: products over a head's channels, at most so many, larger than both
    factors. Any precision counts where channels have no limit."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
            left, right, out = (math.prod(v.aval.shape) for v in (*eqn.invars, eqn.outvars[0]))
            channels = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            sixteen = all(v.aval.dtype.itemsize == 2 for v in eqn.invars)
            if len(batch) == 2 and (sixteen or most == math.inf) and channels <= most and out > max(left, right):
                yield eqn.outvars[0].aval.shape
        for inner in inner_jaxprs(eqn.params.values()):
            yield from _logits(inner, most)


def whole_size(aval: Any) -> float:
    """Bytes of an array."""
    try:
        width = np.dtype(aval.dtype).itemsize
    except TypeError:  # a random key
        width = 8
    return float(math.prod(aval.shape) * width)


@dataclasses.dataclass(frozen=True)
class _Counter:
    shares: Mapping[tuple[int, ...], float]  # shape of what is split like a parameter -> the part that a chip has
    unheld: frozenset[tuple[int, ...]]

    def size(self, aval: Any) -> float:
        if aval.shape in self.unheld:
            return 0.0
        return whole_size(aval) * self.shares.get(aval.shape, 1.0)

    def of(self, jaxpr: core.Jaxpr, consts: Sequence[Value], given: Sequence[Value], results_given: bool) -> Work:
        """What a jaxpr holds and moves on these arguments. `results_given`: its results have their place already."""
        operations: list[Operation] = []
        results = self._flatten(jaxpr, consts, given, operations)
        wanted = {value for value in results if value is not None}
        operations = _used(operations, wanted)
        makers = {value: operation for operation in operations for value in operation.outputs}
        for value in wanted:
            # Sums are added to in place.
            if results_given or (value in makers and makers[value].fuses):
                value.given = True
        return self._run(operations, wanted)

    def _flatten(
        self, jaxpr: core.Jaxpr, consts: Sequence[Value], given: Sequence[Value], operations: list[Operation]
    ) -> list[Value | None]:
        """Appends the jaxpr's operations, calls inlined, and gives its results (None: a literal)."""
        values: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))
        read = lambda v: None if isinstance(v, core.Literal) else values[v]
        for eqn in jaxpr.eqns:
            name, inputs = eqn.primitive.name, [read(v) for v in eqn.invars]
            if name in CALLS:
                called = next(p for p in eqn.params.values() if isinstance(p, (core.ClosedJaxpr, core.Jaxpr)))
                closed = isinstance(called, core.ClosedJaxpr)
                inner = called.jaxpr if closed else called
                held = [Value(float(np.asarray(c).nbytes), True) for c in called.consts] if closed else []
                arguments = [x or Value(0.0, True) for x in inputs]
                outputs = self._flatten(inner, held, arguments, operations)
                values.update((var, out or Value(0.0, True)) for var, out in zip(eqn.outvars, outputs, strict=True))
            elif name in VIEWS and all(x is not None for x in inputs) and len(inputs) >= len(eqn.outvars):
                values.update(zip(eqn.outvars, inputs))
            else:
                # A loop's arguments are known by their places.
                inputs = [x or Value(0.0, True) for x in inputs] if name in LOOPS else [x for x in inputs if x]
                outputs = [Value(self.size(v.aval)) for v in eqn.outvars]
                operation = Operation(name, eqn.params, inputs, outputs)
                if name == "scan":
                    (body,) = inner_jaxprs(eqn.params.values())
                    longer = lambda pairs: sum(a.aval.shape != b.aval.shape for a, b in pairs)
                    operation.sliced = longer(zip(eqn.invars, body.invars, strict=True))
                    operation.stacked = longer(zip(eqn.outvars, body.outvars, strict=True))
                first = inputs[0].weight if len(inputs) == 1 else None
                if first is not None and operation.fuses and eqn.outvars[0].aval.shape == eqn.invars[0].aval.shape:
                    outputs[0].weight = first
                    outputs[0].size = whole_size(eqn.outvars[0].aval) * first.share
                values.update(zip(eqn.outvars, outputs))
                operations.append(operation)
        return [read(v) for v in jaxpr.outvars]

    def _run(self, operations: Sequence[Operation], results: Collection[Value]) -> Work:
        fused, roots = _fusions(operations, results)
        last: dict[Value, int] = {}
        for place in reversed(range(len(operations))):
            operation = operations[place]
            users = [last.get(value, place) for value in operation.outputs]
            when = max(users, default=place) if place in fused else place
            for value in operation.inputs:
                last[value] = max(last.get(value, -1), when)
        after = {value: len(operations) for value in results}
        ends: dict[int, list[Value]] = collections.defaultdict(list)
        for value, place in {**last, **after}.items():
            ends[place].append(value)
        # A gathered parameter stays until the last product that takes it, in whatever cast.
        gathered_until: dict[int, int] = {}
        for place, operation in enumerate(operations):
            for value in _gathers(operation):
                gathered_until[value.weight.name] = place

        held = worst = moved = gathered = 0.0
        gathered_now: dict[int, float] = {}
        for place, operation in enumerate(operations):
            if place not in fused:
                inner = self._inner(operation)
                made = sum(value.size for value in operation.outputs if not value.given)
                read = {root for value in operation.inputs for root in roots.get(value, {value})}
                if operation.name not in LOOPS:
                    moved += sum(value.size for value in read | set(operation.outputs))
                moved, gathered = moved + inner.moved, gathered + inner.gathered
                for value in _gathers(operation):
                    whole = value.whole
                    moved += whole  # every product reads all of it
                    if value.weight.name not in gathered_now:
                        gathered_now[value.weight.name] = whole
                        gathered, moved, held = gathered + whole, moved + whole, held + whole
                dying = sum(v.size for v in ends[place] if not v.given and v not in roots)
                # What is computed element by element takes the place of an operand that is not needed again.
                reused = min(dying, made) if operation.fuses and not operation.reduces else 0.0
                worst = max(worst, held + made - reused + inner.held)
                held += made
                for value in operation.outputs:
                    if value not in last and value not in after and not value.given:
                        held -= value.size  # nobody needs it
            for value in ends[place]:
                if not value.given and value not in roots:
                    held -= value.size
            for name in [name for name in gathered_now if gathered_until[name] == place]:
                held -= gathered_now.pop(name)
        return Work(worst, moved, gathered)

    def _inner(self, operation: Operation) -> Work:
        """The work of a loop's body, all turns together, or of the larger branch."""
        params, inputs = operation.params, operation.inputs
        if operation.name == "scan":
            (body,), length = inner_jaxprs(params.values()), params["length"]
            # Constants come first, then what is carried, then what a turn has a slice of.
            carried = len(body.outvars) - operation.stacked
            consts = len(body.invars) - operation.sliced - carried
            given = []
            for place, var in enumerate(body.invars):
                if consts <= place < consts + carried:
                    given.append(Value(self.size(var.aval), True))
                else:
                    turns = 1 if place < consts else max(length, 1)
                    given.append(Value(inputs[place].size / turns, True, inputs[place].weight))
            one = self.of(body, [Value(0.0, True)] * len(body.constvars), given, results_given=False)
            return Work(one.held, one.moved * length, one.gathered * length)
        if operation.name in ("while", "cond"):
            works = []
            for inner in inner_jaxprs(params.values()):
                given = [Value(self.size(var.aval), True) for var in inner.invars]
                if operation.name == "cond":
                    given = [Value(v.size, True, v.weight) for v in inputs[-len(given) :]] if given else []
                works.append(self.of(inner, [Value(0.0, True)] * len(inner.constvars), given, results_given=False))
            pick = lambda field: max((getattr(work, field) for work in works), default=0.0)
            return Work(pick("held"), pick("moved"), pick("gathered"))
        return Work()


def _used(operations: Sequence[Operation], results: Collection[Value]) -> list[Operation]:
    """Those whose results matter."""
    needed, kept = set(results), []
    for operation in reversed(operations):
        if needed.intersection(operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


def _gathers(operation: Operation) -> list[Value]:
    """The split parameters that an operation needs whole."""
    if operation.name not in PRODUCTS and operation.name != "gather":
        return []
    return [value for value in operation.inputs if value.weight is not None and value.weight.share < 1]


def _fusions(
    operations: Sequence[Operation], results: Collection[Value]
) -> tuple[set[int], dict[Value, frozenset[Value]]]:
    """Which operations are computed where their results are used, and for each such result the arrays it is made from."""
    users: dict[Value, list[Operation]] = collections.defaultdict(list)
    for operation in operations:
        for value in operation.inputs:
            users[value].append(operation)
    fused, roots = set(), {}
    for place, operation in enumerate(operations):
        if not operation.fuses or operation.reduces or (results and any(v in results for v in operation.outputs)):
            continue
        made_from = frozenset(root for value in operation.inputs for root in roots.get(value, {value}))
        using = [user for value in operation.outputs for user in users[value]]
        if not all(user.fuses for user in using):
            continue
        size = max((value.whole for value in operation.outputs), default=0.0)
        large = [root for root in made_from if root.whole * LARGE >= size]
        if len(using) <= 1 or len(large) <= 1:
            fused.add(place)
            roots.update((value, made_from) for value in operation.outputs)
    return fused, roots
