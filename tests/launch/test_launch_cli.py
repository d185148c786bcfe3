"""What commands share."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from launch import cli
from unipic2_jax.core.assets import TINY
from unipic2_jax.models import attention

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def logger():
    found = logging.getLogger("unipic2_jax")
    before = found.level, found.propagate, found.handlers
    yield found
    found.setLevel(before[0])
    found.propagate, found.handlers = before[1:]


def test_the_kernel_of_attention_is_shown_once(logger, capsys):
    cli.show_log()
    cli.show_log()  # does not show everything twice
    attention._say.cache_clear()
    x = jnp.ones((1, 4, 2, 8))
    for _ in range(2):
        attention.attention(x, x, x)
    assert capsys.readouterr().err == "attention on cpu: xla\n"


# Pages (4 kB) that the system gave for the third of three blocks of 64 MB, each freed before the next, in a thread as XLA's are.
PAGES = """
import resource, sys, threading
import numpy as np
from launch import cli

if sys.argv[1] == "keep":
    cli.keep_freed_memory()

def allocate():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(1 << 24, np.float32)
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(pages)

thread = threading.Thread(target=allocate)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc: its settings")
def test_what_was_freed_is_not_asked_for_again_where_there_are_only_cpus():
    def pages(word, platforms="cpu"):
        command = [sys.executable, "-c", PAGES, word]
        environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platforms}
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    # Large pages, where the system gives them, are 512 times fewer.
    assert pages("keep") < 10 < 30 < pages("leave")
    assert pages("keep", "cuda,cpu") > 30


@pytest.mark.parametrize(
    "made, environment, smi, found",
    [
        ("dev/nvidia0", {}, None, ("gpu", "/dev/nvidia0")),
        ("proc/driver/nvidia", {}, None, ("gpu", "/proc/driver/nvidia")),
        (None, {}, "/usr/bin/nvidia-smi", ("gpu", "nvidia-smi")),
        ("dev/accel0", {}, None, ("tpu", "/dev/accel0")),
        ("dev/vfio/0", {}, None, ("tpu", "/dev/vfio/0")),
        ("dev/vfio/vfio", {}, None, None),
        (None, {"TPU_ACCELERATOR_TYPE": "v5p-8"}, None, ("tpu", "$TPU_ACCELERATOR_TYPE")),
        (None, {"TPU_NAME": ""}, None, None),
    ],
)
def test_accelerators_that_the_system_names_are_found(tmp_path, made, environment, smi, found):
    if made:
        (tmp_path / made).parent.mkdir(parents=True)
        (tmp_path / made).touch()
    assert cli.find_accelerator(tmp_path, environment, lambda name: smi) == found


def test_a_full_size_run_does_not_begin_on_a_cpu_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(cli, "_is_installed", lambda package: package == "libtpu")
    gpu, tpu = ("gpu", "/dev/nvidia0"), ("tpu", "/dev/accel0")
    refused = cli.unused_accelerator("sd35_medium", (None, None), "cpu", None, gpu)
    assert "jax-cuda13-plugin is missing; install it with `pip install -r requirements-cuda.txt`" in refused
    assert "(/dev/nvidia0)" in refused and "JAX_PLATFORMS=cpu" in refused
    assert "libtpu is there but does not reach it" in cli.unused_accelerator(
        "edit_reward", (None, "far/away"), "cpu", None, tpu
    )
    for model, folder, backend, platforms, found in [
        ("tiny_metaquery", None, "cpu", None, gpu),  # made for a CPU
        ("edit_reward", TINY, "cpu", None, gpu),
        ("sd35_medium", None, "gpu", None, gpu),
        ("sd35_medium", None, "cpu", "cpu", gpu),  # meant
        ("sd35_medium", None, "cpu", None, None),
    ]:
        assert cli.unused_accelerator(model, (folder, None), backend, platforms, found) is None


def test_the_command_that_trains_asks_for_the_plugin(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    line = [sys.executable, "-m", "launch.train", "--config=configs/kontext.py", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.strip().splitlines()[-1].startswith("The model 'sd35_medium' would train on the CPU")


PROGRAM = """
import jax
from launch import cli

def main(argv):
    print(jax.jit(lambda x: 2 * x)(3.0), jax.config.jax_compilation_cache_dir)

cli.run(main)
"""


def kept(home, *arguments, **environment):
    """The cached programs below `home` after a command that compiles one."""
    named = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    environment = {**named, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(home), **environment}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("6.0"), done.stderr
    return {str(file.parent.relative_to(home)) for file in home.rglob("*-cache")}


def test_compiled_programs_are_kept_where_the_user_says(tmp_path):
    folders = [tmp_path / name for name in ("user", "named", "flag", "off")]
    for folder in folders:
        folder.mkdir()
    user, named, flag, off = folders
    assert kept(user) == {".cache/unipic2_jax/programs"}
    assert kept(named, JAX_COMPILATION_CACHE_DIR=str(named / "mine")) == {"mine"}
    assert kept(flag, f"--compilation_cache={flag}/x", JAX_COMPILATION_CACHE_DIR=str(flag / "mine")) == {"x"}
    assert kept(off, "--compilation_cache=", JAX_COMPILATION_CACHE_DIR=str(off / "mine")) == set()
