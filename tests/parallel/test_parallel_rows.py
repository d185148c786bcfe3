"""Which rows of a batch each process has, on the meshes of real machines and on mixed ones."""

import dataclasses
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.experimental import mesh_utils

from unipic2_jax.parallel import processes
from unipic2_jax.parallel.mesh import batch_shards, make_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="The compiler for TPUs is not installed (`pip install libtpu`)."
)
ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = [
    ("ddp", {}),
    ("fsdp", {}),
    ("fsdp", {"data": 4}),
    ("fsdp_tp", {}),
    ("fsdp_tp", {"tensor": 4}),
    ("fsdp_tp", {"tensor": 8}),
    ("fsdp_sp", {}),
    ("fsdp_sp", {"sequence": 4}),
]


@dataclasses.dataclass(frozen=True)
class Process:
    """A device of a process that is not there."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Device(Process):
    """One that says which slice it is of."""

    slice_index: int = 0


def mixed(monkeypatch, order, size, **sizes):
    """A mesh of processes of `size` devices, whose devices come in this order."""
    devices = np.array([Device(i, i // size) for i in range(len(order))])
    monkeypatch.setattr(mesh_utils, "create_device_mesh", lambda shape, devices, **_: devices[order].reshape(shape))
    return make_mesh(devices, "fsdp", sizes)


def check(mesh, count):
    """Every row is at one process or at several that have all rows in common."""
    batch = 2 * batch_shards(mesh)
    rows = [processes.local_rows(mesh, batch, process).tolist() for process in range(count)]
    assert all(own == sorted(set(own)) for own in rows)
    different = {tuple(own) for own in rows}
    assert sorted(row for own in different for row in own) == list(range(batch))
    return rows


def test_rows_of_mixed_devices(monkeypatch):
    assert check(mixed(monkeypatch, [0, 2, 1, 3], 2), 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert check(mixed(monkeypatch, [0, 2, 1, 3], 2, tensor=2), 2) == [[0, 1, 2, 3]] * 2
    assert check(mixed(monkeypatch, [0, 1, 2, 3], 2, tensor=2), 2) == [[0, 1], [2, 3]]
    pairs = mixed(monkeypatch, [0, 3, 1, 2], 1, sequence=2)
    assert check(pairs, 4) == [[0, 1], [2, 3], [2, 3], [0, 1]]
    with pytest.raises(ValueError, match="A batch of 9 cannot be split over 2 devices"):
        processes.local_rows(pairs, 9, 0)


def test_what_processes_with_the_same_rows_do(monkeypatch):
    mesh = mixed(monkeypatch, [0, 3, 1, 2], 1, sequence=2)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 4)
    assert processes.row_owners(mesh) == [0, 1, 1, 0]
    shares = []
    for process in range(4):
        monkeypatch.setattr(processes.jax, "process_index", lambda process=process: process)
        shares.append(processes.own_share(5, mesh))
    assert shares == [slice(0, 2), slice(2, 5), slice(2, 5), slice(0, 2)]


def test_rows_that_are_shared_in_part_are_refused(monkeypatch):
    mesh = mixed(monkeypatch, list(range(12)), 4, tensor=3)
    with pytest.raises(ValueError, match=r"'tensor': 3.*hold unequal parts of a batch; give the axes 'tensor' and"):
        processes.local_rows(mesh, 8, 0)


@pytest.mark.parametrize("by_slice", [True, False])
def test_slices_are_the_outer_part_of_data(by_slice):
    """Of devices that say which slice they are of, and of those that do not, whose processes are slices."""
    own = lambda i: Device(i, process_index=i // 2, slice_index=(i // 4) % 2)
    devices = [own(i) if by_slice else Process(i, process_index=i // 4) for i in range(8)]
    mesh = make_mesh(devices[::-1], "fsdp", {"data": 4}, slices=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert [{device.id // 4 for device in group.flat} for group in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match=r"4 slices are asked for and the devices are of 2; set parallel.slices=2"):
        make_mesh(devices, "ddp", slices=4)


ALL = """
import json, sys
import jax, numpy as np
from jax.experimental import mesh_utils
jax.config.update("jax_num_cpu_devices", 4)
from unipic2_jax.parallel import processes
from unipic2_jax.parallel.mesh import batch_sharding, make_mesh, shard_batch
processes.initialize()
order, sizes = json.loads(sys.argv[1]), json.loads(sys.argv[2])
mesh_utils.create_device_mesh = lambda shape, devices, **_: np.array(devices)[order].reshape(shape)
mesh = make_mesh(preset="fsdp", sizes=sizes)
batch = np.arange(32.0).reshape(16, 2)
rows = processes.local_rows(mesh, 16)
placed = shard_batch(batch[rows], mesh, local=True)
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, batch[shard.index])
np.testing.assert_array_equal(processes.rows_to_host(placed, mesh), batch[rows])
np.testing.assert_array_equal(processes.to_host(placed), batch)
np.testing.assert_array_equal(processes.gather_rows(batch[rows], mesh, 16), batch)
share = processes.own_share(5, mesh)
assert sum(processes.gather_json(list(range(5))[share], mesh), []) == list(range(5))
print("rows", rows.tolist())
"""


@pytest.mark.parametrize(
    "order, sizes, rows",
    [
        ("[0, 4, 1, 5, 2, 6, 3, 7]", "{}", [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]),
        ("[5, 0, 2, 6, 1, 7, 4, 3]", '{"data": 2}', [[2, 3, 4, 5, 8, 9, 14, 15], [0, 1, 6, 7, 10, 11, 12, 13]]),
        ("[0, 4, 1, 5, 2, 6, 3, 7]", '{"tensor": 2}', [list(range(16))] * 2),
        ("[0, 1, 4, 5, 2, 3, 6, 7]", '{"sequence": 2}', [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
    ],
)
def test_what_processes_bring_lies_where_it_belongs(order, sizes, rows):
    """Eight devices of two processes, mixed as on a torus."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALL, order, sizes],
            env={**os.environ, **several, "JAX_PROCESS_ID": str(number), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process, own in zip(started, rows):
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
        assert out.splitlines()[-1] == f"rows {own}"  # gloo prints too


@needs_libtpu
@pytest.mark.parametrize("name", ["v5p:2x2x2", "v5p:4x4x4", "v5e:8x8", "v6e:8x8"])
def test_every_host_of_a_slice_has_rows(monkeypatch, name):
    from unipic2_jax.perf.topology import read_topology, tpu_devices

    for variable, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setitem(os.environ, variable, value)
    devices = tpu_devices(read_topology(name))
    count = 1 + max(device.process_index for device in devices)
    gaps = 0
    for preset, sizes in LAYOUTS:
        rows = check(make_mesh(devices, preset, sizes), count)
        gaps += any(np.ptp(own) >= len(own) for own in rows)
    # Or this tests nothing; JAX 0.12 lays the smallest of them out host by host.
    assert gaps or name == "v5p:2x2x2"
