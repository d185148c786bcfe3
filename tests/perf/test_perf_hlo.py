"""Bytes that compiled programs move: loops by their turns, slices by their size, collectives by kind."""

import subprocess
import sys
from pathlib import Path

import eight_devices
import jax
import jax.numpy as jnp
import pytest

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
