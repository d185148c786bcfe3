"""Several processes of one machine (gloo) are one run: the same numbers, the same files, and no one waits for the dead."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from process_child import HEARTBEAT

from unipic2_jax.parallel.processes import LOST_PEER, is_lost_peer, several_processes_expected
from unipic2_jax.training.metrics import read_evaluations, read_rows

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4
PATIENCE = 1800  # seconds; a loaded machine must not fail a test of numbers


def start(workdir, count, *arguments, **environment):
    """`count` processes with DEVICES devices in all."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "support" / "process_child.py"),
        str(workdir),
        str(DEVICES // count),
    ]
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [*command, *map(str, arguments)],
            env={**base, **({**several, "JAX_PROCESS_ID": str(number)} if count > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


def finish(started, silent=None):
    """Exit codes, outputs, and when each ended; number `silent` is not waited for, and nothing goes on running."""
    outputs, ended = [""] * len(started), [0.0] * len(started)

    def watch(number, process):
        outputs[number] = process.communicate()[0]
        ended[number] = time.time()

    watchers = [threading.Thread(target=watch, args=pair) for pair in enumerate(started)]
    for watcher in watchers:
        watcher.start()
    try:
        for number, watcher in enumerate(watchers):
            if number != silent:
                watcher.join(PATIENCE)
    finally:
        for process in started:
            process.kill()
        for watcher in watchers:
            watcher.join()
    return [process.returncode for process in started], outputs, ended


def run(workdir, count, *arguments, **environment):
    codes, outputs, _ = finish(start(workdir, count, *arguments, **environment))
    assert codes == [0] * count, outputs
    return contents(workdir)


def contents(workdir):
    with np.load(workdir / "export" / "params.npz") as arrays:
        params = {name: arrays[name] for name in arrays.files}
    return params, read_rows(workdir / "metrics.jsonl"), read_evaluations(workdir)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run", 1)


def assert_equal(found, wanted):
    """The same up to the rounding of sums in another order."""
    for name, value in wanted[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-3, atol=2e-5, err_msg=name)
    assert [row["total_step"] for row in found[1]] == [row["total_step"] for row in wanted[1]]
    for ours, theirs in zip(found[1], wanted[1]):
        assert ours["stage"] == theirs["stage"]
        for name in ("loss", "reward", "kl", "validation/t2i", "validation/edit", "toy/brightness"):
            assert (name in ours) == (name in theirs)
            np.testing.assert_allclose(ours.get(name, 0), theirs.get(name, 0), rtol=1e-3, atol=1e-5, err_msg=name)
    assert [r["total_step"] for r in found[2]] == [r["total_step"] for r in wanted[2]]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_to_the_numbers_of_one(reference, tmp_path, count):
    assert {row["stage"] for row in reference[1]} == {"flow", "edit", "t2i"}
    assert_equal(run(tmp_path / "run", count), reference)


@pytest.mark.parametrize(
    "count, preset, order",
    [
        (2, "fsdp", "0,2,1,3"),  # every process has every second row
        # Both have all rows, and half of every sample's heads.
        pytest.param(2, "fsdp_tp", "0,2,1,3", marks=pytest.mark.slow),
        pytest.param(4, "fsdp_sp", "0,3,1,2", marks=pytest.mark.slow),  # two and two have the same rows
    ],
)
def test_devices_of_processes_may_be_mixed(reference, tmp_path, count, preset, order):
    assert_equal(run(tmp_path / "run", count, TOY_PRESET=preset, TOY_ORDER=order), reference)
    rows = [json.loads(line) for path in (tmp_path / "run/audit/edit/000000").glob("*.jsonl") for line in path.open()]
    assert sorted(row["image"] for row in rows) == [f"{number:05d}.png" for number in range(16)]


def assert_left(found, lost):
    """One process was lost; the others said so in a sentence and ended with the code for it, in bounded time."""
    codes, outputs, ended = found
    at = float(re.search(r"^signal at (\S+)$", outputs[lost], re.MULTILINE)[1])
    for number, code in enumerate(codes):
        if number != lost:
            assert code == LOST_PEER, outputs
            sentence = rf"^Process {number} lost another process of this run \(.*\); start all of them again with .*$"
            assert len(re.findall(sentence, outputs[number], re.MULTILINE)) == 1, outputs
            assert ended[number] - at < 3 * HEARTBEAT, (ended[number] - at, outputs)
            print(f"process {number} ended {ended[number] - at:.1f} s after {lost} was lost")


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_any_number_goes_on(reference, tmp_path):
    found = finish(start(tmp_path / "run", 2, 1, "edit", 2, int(signal.SIGKILL)))
    assert found[0][1] == -signal.SIGKILL
    assert_left(found, 1)
    assert not (tmp_path / "run" / "export").exists()
    assert_equal(run(tmp_path / "run", 4), reference)


@pytest.mark.parametrize(
    "lost, number",
    [
        (0, signal.SIGKILL),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_lost_stops_the_others(tmp_path, lost, number):
    """The first process, with which all others talk, and another; gone with their connections, and silent."""
    started = start(tmp_path / "run", 2, lost, "flow", 3, int(number))
    assert_left(finish(started, silent=lost), lost)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_one_is_said_by_it_and_stops_the_others(tmp_path, fails):
    found = finish(start(tmp_path / "run", 2, fails, "flow", 3, 0))
    assert found[0][fails] == 1 and "ZeroDivisionError: of its own" in found[1][fails], found
    assert_left(found, fails)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_saves(reference, tmp_path):
    codes, outputs, _ = finish(start(tmp_path / "run", 2, 1, "edit", 1, int(signal.SIGTERM)))
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "after step 2 of 'edit'" in outputs[0]
    assert_equal(run(tmp_path / "run", 1), reference)


@pytest.mark.parametrize(
    "error, lost",
    [
        ("UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:1234", True),
        ("INTERNAL: Gloo ReduceScatter failed: Timed out waiting 30000ms for recv operation to complete", True),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats): /job:jax_worker/task:1", True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: export::0", True),
        ("INTERNAL: Barrier failed because task 1 left", True),
        ("ABORTED: Coordination service is shutting down.", True),
        ("INTERNAL: Coordination service agent is in error state", True),
        (
            "INTERNAL: NCCL operation ncclAllReduce(...) failed: remote process exited or there was a network error",
            True,
        ),
        ("INTERNAL: NCCL operation ncclCommInitRankConfig failed: unhandled system error", True),
        (
            "INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled cuda error. Last NCCL warning(error) log entry: "
            "'Cuda failure 'an illegal memory access was encountered'' aborted",
            False,
        ),
        ("INTERNAL: CUDA error: Failed to end stream capture: CUDA_ERROR_ILLEGAL_ADDRESS", False),
        ("INTERNAL: CUDA error ...ILLEGAL_ADDRESS: an illegal memory access was encountered", False),
        ("UNKNOWN: CUDNN_STATUS_EXECUTION_FAILED in external/xla/xla/stream_executor/cuda/cuda_dnn.cc(1)", False),
        ("INTERNAL: Mosaic failed to compile TPU kernel: 'nvgpu.mbarrier.create' op is not supported", False),
        ("INTERNAL: Core halted unexpectedly", False),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6442450944 bytes; gloo", False),
        ("INVALID_ARGUMENT: Argument 1 of the barrier differs", False),
    ],
)
def test_which_errors_say_that_another_process_is_lost(monkeypatch, error, lost):
    error = jax.errors.JaxRuntimeError(error)
    assert not is_lost_peer(error)  # there are no others
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert is_lost_peer(error) is lost


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, False),
        ({"JAX_NUM_PROCESSES": "1"}, False),
        ({"JAX_NUM_PROCESSES": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"SLURM_JOB_ID": "7"}, False),  # a batch script itself, before srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # any pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_who_expects_others(environment, expected):
    assert several_processes_expected(environment) is expected


def test_kubernetes_without_its_package_is_named():
    """JAX finds the other pods of a Job with the package `kubernetes`, and only warns where it is missing."""
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0", "JAX_PLATFORMS": "cpu"}
    script = "import sys\nsys.modules['kubernetes'] = None\nfrom unipic2_jax.parallel import processes\n"
    done = subprocess.run(
        [sys.executable, "-c", script + "processes.initialize()"],
        env={**os.environ, **pod, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ValueError: The other processes of this run were not found (") and "jax[k8s]" in said
