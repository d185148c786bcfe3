"""XLA's flags: the user's own win, they reach GPU machines alone, a plan compiles with a run's, and the compiler takes each."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch import cli
from unipic2_jax.core.errors import ConfigError
from unipic2_jax.parallel import xla
from unipic2_jax.perf import compiler
from unipic2_jax.perf.topology import gpu_devices, has_compiler, read_topology
from unipic2_jax.training.config import make_config, validate

TRITON = "--xla_gpu_enable_triton_gemm"
MACHINE = read_topology("gpu:1xh100")


def test_flags_are_added_and_the_users_own_win():
    environment = {}
    xla.set_gpu_flags("recipe", environment)
    assert environment["XLA_FLAGS"].split() == [f"{TRITON}=false"]
    xla.set_gpu_flags("recipe", environment)  # again
    assert environment["XLA_FLAGS"].split() == [f"{TRITON}=false"]
    for own in (f"--xla_dump_to=/tmp/x {TRITON}=true", f"{TRITON} --xla_dump_to=/tmp/x"):
        environment = {"XLA_FLAGS": own}
        xla.set_gpu_flags("recipe", environment)
        assert environment["XLA_FLAGS"].split() == own.split()
    environment = {"XLA_FLAGS": "--xla_dump_to=/tmp/x"}
    xla.set_gpu_flags("none", environment)
    assert environment == {"XLA_FLAGS": "--xla_dump_to=/tmp/x"}
    assert all(flag.reason for flag in xla.GPU_FLAGS.values())


def test_only_machines_with_a_gpu_get_them(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    for found in (None, ("tpu", "/dev/accel0")):
        monkeypatch.setattr(cli, "find_accelerator", lambda found=found: found)
        cli.tell_compiler()
        assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setattr(cli, "find_accelerator", lambda: ("gpu", "/dev/nvidia0"))
    cli.tell_compiler("none")
    assert os.environ["XLA_FLAGS"] == ""
    cli.tell_compiler()
    assert TRITON in os.environ["XLA_FLAGS"]


def test_a_configuration_turns_them_off():
    stage = {"kind": "flow", "steps": 1}
    config = make_config({"schedule": ("a",), "stages": {"a": stage}})
    assert validate(config).xla_flags == "recipe"
    config.xla_flags = "non"
    with pytest.raises(ConfigError, match=r"^config\.xla_flags is 'non'; did you mean 'none'"):
        validate(config)


def test_this_jax_starts_with_every_flag():
    """XLA ends a process at a name that it does not know, on whatever it then computes."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    xla.set_gpu_flags("recipe", environment)
    code = "import jax; print(int(jax.numpy.ones(2).sum()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.skipif(not has_compiler(MACHINE), reason="The compiler for GPUs is not installed.")
def test_the_compiler_for_gpus_takes_each_and_a_plan_compiles_with_them(tmp_path):
    sharding = NamedSharding(Mesh(gpu_devices(MACHINE), ("x",)), PartitionSpec())
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharding)
    traced = jax.jit(lambda x: jax.nn.gelu(x @ x)).trace(x)
    texts = {c: traced.lower().compile(compiler_options=xla.gpu_options(c)).as_text() for c in xla.CHOICES}
    assert "__cublas$lt$matmul" in texts["recipe"] and "__cublas" not in texts["none"]
    cache = compiler.Cache(tmp_path)
    for choice in xla.CHOICES:
        compiler.compile_program(traced, sharding.mesh, MACHINE, cache, print, choice)
    assert len(list(tmp_path.iterdir())) == 2  # what was compiled otherwise is another program
