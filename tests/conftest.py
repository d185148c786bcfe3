"""Settings of all tests."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

# Tests compile many small programs and run each of them once or twice: with a backend that optimises nothing the suite takes half
# the time. It must be set before JAX is imported; commands that tests start inherit it. XLA ends at once at a flag that it does
# not know, and later releases have lost the emitters of the last one.
FLAGS = [
    "xla_backend_optimization_level=0",
    "xla_llvm_disable_expensive_passes=true",
    "xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *(f"--{flag}" for flag in FLAGS)]).strip()

# The same programs are compiled by many tests, and by the commands that they start: once is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Files that take minutes, because they start many processes one after the other: begun first, they do not end alone.
LONG = ("test_parallel_processes", "test_training_resume", "test_training_flow_data", "test_parallel_presets")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """fsspec's store in memory, empty, and a cache of its own for what comes from addresses."""
    import fsspec

    monkeypatch.setenv("UNIPIC2_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()
