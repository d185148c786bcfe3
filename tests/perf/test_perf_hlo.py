"""Bytes that compiled programs move: loops by their turns, slices by their size, collectives by kind."""

import subprocess
import sys
from pathlib import Path

import eight_devices
import jax
import jax.numpy as jnp
import pytest

from unipic2_jax.perf import movers
from unipic2_jax.perf.hlo import Module

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH, ROWS = 13, 64, 32

SHARDED = f"""
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from unipic2_jax.perf.hlo import Module

mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
place = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

def loss(weights, x):
    def body(x, w):
        x = jax.lax.with_sharding_constraint(x, P("fsdp", None))
        return jnp.tanh(x @ w), None
    return jax.lax.scan(jax.checkpoint(body), x, weights)[0].sum()

with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, P(None, "fsdp", None)))
    compiled = step.lower(place(({LAYERS}, {WIDTH}, {WIDTH}), None, "fsdp", None), place(({ROWS}, {WIDTH}), "fsdp", None)).compile()
found = Module.read(compiled.as_text())
print(found.collective_bytes(), max(found.runs.values()))
"""


def test_collectives_of_a_scanned_and_sharded_program():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=eight_devices.ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = WIDTH * WIDTH * 4
    # A layer's weights are gathered in the forward and in the backward pass, and their gradients are reduced; XLA's CPU
    # backend reduces them whole.
    assert done.stdout.strip() == f"{{'all-gather': {2 * LAYERS * one}, 'all-reduce': {2 * LAYERS * one}}} {LAYERS}"


def test_memory_that_is_moved():
    weights, x = jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((ROWS, WIDTH))

    @jax.jit
    def run(weights, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    moved = Module.read(run.lower(weights, x).compile().as_text()).moved_bytes()
    layer, rows = WIDTH * WIDTH * 4, ROWS * WIDTH * 4
    # A turn reads a layer and the rows and writes rows; what is beside that is copies of either, never of all layers.
    assert LAYERS * (layer + 2 * rows) <= moved < LAYERS * (4 * layer + 8 * rows)


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no entry"):
        Module.read("HloModule nothing")


TPU = """HloModule step

%gathered (input.6: bf16[1536,64]) -> bf16[384,64] {
  %input.6 = bf16[1536,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[1536,64]{1,0:T(8,128)(2,1)} all-reduce(%input.6), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.1 = bf16[384,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %input.6), dynamic_slice_sizes={384,64}
}

%body (state: (s32[], bf16[1536,64])) -> (s32[], bf16[1536,64]) {
  %state = (s32[]{:T(128)}, bf16[1536,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[1536,64]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %kept = bf16[384,64]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%gathered
  ROOT %next = (s32[]{:T(128)}, bf16[1536,64]{1,0:T(8,128)(2,1)}) tuple(%state, %x)
}

%condition (state.1: (s32[], bf16[1536,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %state.1 = (s32[]{:T(128)}, bf16[1536,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

ENTRY %main (given: (s32[], bf16[1536,64])) -> (s32[], bf16[1536,64]) {
  %given = (s32[]{:T(128)}, bf16[1536,64]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, bf16[1536,64]{1,0:T(8,128)(2,1)}) while(%given), condition=%condition, body=%body
}
"""


def test_what_the_compiler_for_tpus_writes():
    """Loops whose turns only their condition knows, and collectives inside fusions."""
    found = Module.read(TPU)
    assert found.runs == {"main": 1, "body": 3}
    assert found.collective_bytes() == {"reduce-scatter": 3 * 1536 * 64 * 2}


GPU = """HloModule step

%first_rows (whole: f32[8,64,64], turn: s32[], other: f32[64,64]) -> f32[64,64] {
  %whole = f32[8,64,64]{2,1,0} parameter(0)
  %turn = s32[] parameter(1)
  %other = f32[64,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %layer = f32[1,64,64]{2,1,0} dynamic-slice(%whole, %turn, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %flat = f32[64,64]{1,0} bitcast(%layer)
  ROOT %sum = f32[64,64]{1,0} add(%flat, %other)
}

%half (joined: f32[64,128]) -> f32[64,64] {
  %joined = f32[64,128]{1,0} parameter(0)
  %same = f32[64,128]{1,0} bitcast(%joined)
  ROOT %left = f32[64,64]{1,0} slice(%same), slice={[0:64], [0:64]}
}

%product (a: f32[64,128], b: f32[64,64]) -> f32[64,64] {
  %a = f32[64,128]{1,0} parameter(0)
  %b = f32[64,64]{1,0} parameter(1)
  %inner = f32[64,64]{1,0} fusion(%a), kind=kLoop, calls=%half
  ROOT %dot = f32[64,64]{1,0} dot(%inner, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%put (stack: f32[8,64,64], row: f32[64,64], at: s32[]) -> f32[8,64,64] {
  %stack = f32[8,64,64]{2,1,0} parameter(0)
  %row = f32[64,64]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %one = f32[1,64,64]{2,1,0} bitcast(%row)
  %null = s32[] constant(0)
  ROOT %put.1 = f32[8,64,64]{2,1,0} dynamic-update-slice(%stack, %one, %at, %null, %null)
}

ENTRY %main (x: f32[8,64,64], i: s32[], y: f32[64,64], z: f32[64,128]) -> f32[8,64,64] {
  %x = f32[8,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[64,64]{1,0} parameter(2)
  %z = f32[64,128]{1,0} parameter(3)
  %gated = f32[64,64]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%first_rows, metadata={op_name="jit(run)/while/body/jvp(MMDiT)/checkpoint/blocks/ff/mul"}
  %made = f32[64,64]{1,0} fusion(%z, %gated), kind=kCustom, calls=%product, metadata={op_name="jit(run)/transpose(jvp(MMDiT))/rematted_computation/blocks/ff/dot_general"}
  %called = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%made, %y), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(run)/transpose(jvp(MMDiT))/blocks/ff/dot_general"}, backend_config={"gemm_backend_config":{}}
  %gotten = f32[64,64]{1,0} get-tuple-element(%called), index=0
  ROOT %kept = f32[8,64,64]{2,1,0} fusion(%x, %gotten, %i), kind=kLoop, calls=%put, metadata={op_name="jit(run)/while/body/jvp(MMDiT)/dynamic_update_slice"}
}
"""


def test_what_the_compiler_for_gpus_writes():
    """Slices inside of fusions, also of fusions in them, updates in place, and a library's room to work in count for what they are."""
    found = Module.read(GPU)
    lines, layer = found.computations["main"], 64 * 64 * 4
    moved = {name: found.moved(lines, lines[name]) for name in ("gated", "made", "called", "kept")}
    assert moved == {"gated": 3 * layer + 4, "made": 3 * layer, "called": 3 * layer, "kept": 2 * layer + 4}


def test_movers_are_all_of_what_is_moved_by_kind_and_pass():
    found = Module.read(GPU)
    listed = movers.movers(found)
    assert sum(mover.moved for mover in listed) == found.moved_bytes()
    assert {mover[:3] for mover in listed} == {
        ("element-wise", "forward", "MMDiT/blocks/ff/mul"),
        ("products", "recomputed", "MMDiT/blocks/ff/dot_general"),
        ("products", "backward", "MMDiT/blocks/ff/dot_general"),
        ("layers of a stack", "forward", "MMDiT/dynamic_update_slice"),
    }
    written = movers.table(listed, 1)
    whole = found.moved_bytes()
    (products,) = [moved for (kind,), moved in movers.by(listed, "kind") if kind == "products"]
    assert f"| products | {products / 1e12:.3f} | {products / whole:.1%} |" in written
    assert written.count("| blocks") == 0 and written.count("MMDiT/blocks/ff") == 1


def test_movers_of_a_program_of_this_machine():
    """A scan with a gradient: its products are found in both passes, and every byte has a place."""

    def loss(weights, x):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, weights)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((3, 64, 64)), jnp.ones((32, 64))).compile()
    found = Module.read(compiled.as_text())
    listed = movers.movers(found)
    assert sum(mover.moved for mover in listed) == found.moved_bytes()
    assert {mover.kind for mover in listed} <= set(movers.KINDS) and {mover.phase for mover in listed} <= set(
        movers.PASSES
    )
    passes = {mover.phase for mover in listed if mover.kind == "products"}
    assert passes == set(movers.PASSES)
