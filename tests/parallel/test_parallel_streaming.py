"""What one process writes of parameters that several hold: the same bytes, and never the whole model at once."""

import threading
import tracemalloc

import jax
import numpy as np
import pytest

from unipic2_jax.core.assets import TINY
from unipic2_jax.models.bundle import init_bundle, load_bundle, save_bundle
from unipic2_jax.parallel import streaming
from unipic2_jax.weights import io


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def two_processes(monkeypatch):
    """A main process beside one in another thread that has the same parameters; what they tell each other, and what is gathered."""
    told, heard, gathered, me = threading.Barrier(2, timeout=60), [0, 0], [], threading.local()

    def largest(value):
        heard[me.number] = value
        told.wait()
        found = max(heard)
        told.wait()
        return found

    def gather(leaf):
        array = np.asarray(leaf)
        gathered.append((me.number, array.shape, array.nbytes))
        return array

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(streaming, "is_main", lambda: me.number == 0)
    monkeypatch.setattr(streaming, "max_over_processes", largest)
    monkeypatch.setattr(streaming, "to_host", gather)

    def run(params, write):
        def other():
            me.number = 1
            streaming.streamed(params, None)

        beside = threading.Thread(target=other)
        beside.start()
        me.number = 0
        try:
            streaming.streamed(params, write)
        finally:
            beside.join(60)
        assert not beside.is_alive()
        return gathered

    return run


def test_a_bundle_of_two_processes_has_the_bytes_of_one(two_processes, tmp_path):
    bundle = load_bundle(TINY)
    save_bundle(bundle, tmp_path / "one", "float32")
    gathered = two_processes(
        bundle.params, lambda params: save_bundle(bundle.replace(params=params), tmp_path / "two", "float32")
    )
    assert files(tmp_path / "one") == files(tmp_path / "two")
    mine, others = ([entry[1:] for entry in gathered if entry[0] == number] for number in (0, 1))
    assert mine == others  # collectives meet in the same order
    # Every number came once, and of stacked layers a layer at a time.
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(bundle.params)]
    assert sum(size for _, size in mine) == sum(sizes) and len(mine) > len(sizes)


def test_an_error_while_writing_leaves_nobody_waiting(two_processes):
    def write(params):
        np.asarray(params["a"])
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        two_processes({"a": jax.numpy.ones(3)}, write)


def test_writing_takes_memory_for_a_tensor_and_not_for_the_model(tmp_path, monkeypatch):
    """NumPy's memory while a model is written in another precision and in its own, from parameters that are there once."""
    monkeypatch.setattr(io, "COPY_BYTES", 2**16)
    bundle = init_bundle("tiny", 0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(bundle.params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(bundle.params))
    save_bundle(bundle, tmp_path / "first")  # what is imported on the way is no tensor
    for dtype in ("float32", "float16", None):
        before = sum(array.nbytes for array in jax.live_arrays())
        tracemalloc.start()
        save_bundle(bundle, tmp_path / str(dtype), dtype)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * largest + 2**20 < size / 3, (dtype, peak, size)
        assert sum(array.nbytes for array in jax.live_arrays()) <= before
