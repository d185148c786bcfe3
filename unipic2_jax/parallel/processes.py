"""Several processes that are one run: how they find each other, whose rows are whose, what only one of them does.

Every process runs the same program with the same configuration and sees the same workdir. What a step needs from outside (a
batch, rewards) each process makes for its own devices; everything else is a function of arrays that JAX keeps in step.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from unipic2_jax.parallel.compat import multihost_utils
from unipic2_jax.parallel.mesh import batch_sharding, batch_shards, check_rows

# A process that says nothing for so long is taken for dead, and the others stop. One that is killed is missed at once wherever
# its connections are closed with it.
HEARTBEAT_SECONDS = 60
LOST_PEER = 75  # exit code of those that are left: EX_TEMPFAIL, start again
PARTING_SECONDS = 10.0  # in which processes that end together wait for each other
# How an error begins that says what a process did to itself, and would do again.
OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "FAILED_PRECONDITION")
# How one begins, or what it speaks of, that comes of others which do not answer. NCCL also tells of errors of CUDA.
LOST_ERRORS = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b|gloo|heartbeat|coordination ?service"
    r"|\bbarrier (timed out|failed)|connection (closed|reset|refused)|socket closed"
    r"|nccl(?!.*cuda).*(remote process|network|system error|connection|time(d )?out|abort)",
    re.IGNORECASE | re.DOTALL,
)
WHEN = ("auto", "on", "off")


def several_processes_expected(environment: dict[str, str] | None = None) -> bool:
    """Whether the environment is that of a run of several processes: ours, Slurm's, Open MPI's, Kubernetes' or a TPU pod's."""
    env = os.environ if environment is None else environment
    count = lambda name: int(env.get(name) or 1)
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    return (
        count("JAX_NUM_PROCESSES") > 1
        or ("SLURM_STEP_NUM_TASKS" in env and count("SLURM_STEP_NUM_TASKS") > 1)
        or count("OMPI_COMM_WORLD_SIZE") > 1
        or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env)
        or len(hosts) > 1
        or count("MEGASCALE_NUM_SLICES") > 1
    )


def initialize(when: str = "auto", heartbeat: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes of the run; call it before anything touches a device, and `together` around the rest.

    JAX finds them from the variables of Slurm, Open MPI, Kubernetes and TPU pods, or from JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      when: 'auto' joins when the environment speaks of several processes, 'on' always, 'off' never.
      heartbeat: seconds after which a process that says nothing is lost; also how long one that ends waits for the others.

    Raises:
      ValueError: when it should join and does not find out whom.
    """
    if when not in WHEN:
        raise ValueError(f"distributed is '{when}'; use one of {', '.join(WHEN)}.")
    if when == "off" or (when == "auto" and not several_processes_expected()):
        return
    number = lambda name: int(os.environ[name]) if os.environ.get(name) else None
    # The loop saves after SIGTERM itself; JAX's own service would take the signal from it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"),
            process_id=number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        alone = "KUBERNETES_SERVICE_HOST" in os.environ and importlib.util.find_spec("kubernetes") is None
        raise ValueError(
            f"The other processes of this run were not found ({str(error).splitlines()[0]}); "
            + ("install jax[k8s], with which JAX asks Kubernetes for them, or " * alone)
            + "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or --distributed=off."
        ) from error
    _leave_instead_of_aborting()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What all processes of a run do; in one that cannot go on without another, a sentence and the exit code `LOST_PEER`.

    An error of a process's own is raised as ever. Since that process then ends, the others lose it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_lost_peer(error):
            raise
        _leave(str(error).splitlines()[0][:200])


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that processes could not talk to each other; what is not known to say so does not."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1:
        return False
    return not str(error).startswith(OWN_ERRORS) and LOST_ERRORS.search(str(error)) is not None


_LEAVING = threading.Lock()


def _leave(reason: str) -> NoReturn:
    """Says why and ends the process, not in order: that would wait for the one that is gone."""
    _LEAVING.acquire()  # for ever: several threads can find out
    sentence = (
        f"Process {jax.process_index()} lost another process of this run ({reason}); start all of them again with the same "
        "command, in any number: the run goes on from its last checkpoint."
    )
    print(sentence, file=sys.stderr, flush=True)
    os._exit(LOST_PEER)


def end(code: int) -> NoReturn:
    """Ends the process now. Python would wait for its threads: a compilation takes minutes, and cannot be interrupted.

    Processes that end together part in order, or the first would look lost to the others; one that ends alone waits a moment.
    """
    _LEAVING.acquire()  # who is lost from here on does not change how this process ends
    parting = threading.Thread(target=_part, daemon=True)
    parting.start()
    parting.join(PARTING_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _part() -> None:
    with contextlib.suppress(Exception):  # the others are gone
        jax.distributed.shutdown()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Around all that a process does: it then ends at once, with the words and the code with which Python would end it."""
    code: Any = 1
    try:
        yield
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    end(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _leave_on_abort(number: int) -> None:
    del number
    _leave("JAX, which says more above, gave up")


def _leave_instead_of_aborting() -> None:
    """Makes of an abort what it is in a run of several processes.

    JAX's service aborts a process, from a thread of its own, as soon as another one is known to be dead; so does gloo when
    it does not understand what it receives. JAX offers no other way out: a callback in Python crashes on its argument. The
    handler is the C library's, called by the thread that aborts, since Python's handlers would come too late.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(_leave_on_abort, ctypes.c_void_p))


def is_main() -> bool:
    """Whether this process writes what is written once: records, reports, exports."""
    return jax.process_index() == 0


@functools.lru_cache
def _parts(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Process -> which of the mesh's parts of a batch its devices hold, ascending; processes in order."""
    count, owners = batch_shards(mesh), collections.defaultdict(set)
    for device, (part,) in batch_sharding(mesh).devices_indices_map((count,)).items():
        owners[device.process_index].add(part.indices(count)[0])
    held = {process: tuple(sorted(owners[process])) for process in sorted(owners)}
    # The processes' parts are equal or have nothing in common, and there are as many of each.
    different = set(held.values())
    if len({len(parts) for parts in different}) > 1 or sum(map(len, different)) > count:
        raise ValueError(
            f"On the mesh {dict(mesh.shape)} processes hold unequal parts of a batch; give the axes 'tensor' and 'sequence' "
            "sizes whose product divides the devices of a process or is a multiple of them."
        )
    return held


def local_rows(mesh: Mesh, batch: int, process: int | None = None) -> np.ndarray:
    """The numbers [n] of the rows of a batch that this process's devices hold, ascending; in a run of one process, all.

    They have gaps where a host's devices are no neighbours along the axes of a batch, as on a torus. Processes between which
    'tensor' or 'sequence' is split hold the same rows: see `row_owners`.

    Args:
      process: instead of this one.

    Raises:
      ValueError: when the batch, or the mesh, does not give every process as much.
    """
    if process is None and jax.process_count() == 1:
        return np.arange(batch)
    check_rows(batch, mesh)
    parts = _parts(mesh)[jax.process_index() if process is None else process]
    return np.arange(batch).reshape(batch_shards(mesh), -1)[list(parts)].ravel()


def row_owners(mesh: Mesh) -> list[int]:
    """For each process the first of those that hold the same rows of a batch. They do the same, and the first one is heard."""
    if jax.process_count() == 1:
        return [0]
    parts = list(_parts(mesh).values())
    return [parts.index(own) for own in parts]


def gather_rows(values: np.ndarray, mesh: Mesh, batch: int) -> np.ndarray:
    """The rows [batch, ...] of all processes, each of which has those of `local_rows`."""
    if jax.process_count() == 1:
        return values
    everyone = multihost_utils.process_allgather(values)
    whole = np.empty((batch, *values.shape[1:]), values.dtype)
    for process in set(row_owners(mesh)):
        whole[local_rows(mesh, batch, process)] = everyone[process]
    return whole


def own_share(count: int, mesh: Mesh) -> slice:
    """Which of `count` things this process does when they are shared as evenly as possible; `row_owners` do those of others."""
    leading = row_owners(mesh)
    different = sorted(set(leading))
    bounds = np.arange(len(different) + 1) * count // len(different)
    own = different.index(leading[jax.process_index()])
    return slice(*bounds[own : own + 2].tolist())


def gather_json(value: Any, mesh: Mesh) -> list[Any]:
    """What every share's process has, in the order of `own_share`: numbers (NaN too), texts, lists, dictionaries of texts."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded = np.zeros(max_over_processes(len(text)), np.uint8)
    padded[: len(text)] = text
    lengths, texts = multihost_utils.process_allgather((np.asarray(len(text)), padded))
    return [json.loads(texts[process][: lengths[process]].tobytes()) for process in sorted(set(row_owners(mesh)))]


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on this host, also when other hosts hold parts of it."""
    return np.asarray(x) if _is_here(x) else multihost_utils.process_allgather(x, tiled=True)


def rows_to_host(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """The `local_rows` of an array whose leading axis is the batch."""
    if jax.process_count() == 1:
        return np.asarray(x)
    x = jax.device_put(x, batch_sharding(mesh))
    rows = {shard.index[0].indices(x.shape[0])[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


def tree_to_host(tree: Any) -> Any:
    """`to_host` of every leaf, one after the other."""
    return jax.tree.map(to_host, tree)


def _is_here(x: jax.Array) -> bool:
    return x.is_fully_addressable or x.is_fully_replicated


def max_over_processes(value: int) -> int:
    """The largest of all processes' values, so that all of them do the same."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.asarray(value))))


def wait_for_all(where: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
