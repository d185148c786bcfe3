"""What commands share."""

import logging
import platform
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from launch import cli
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
