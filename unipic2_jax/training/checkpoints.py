"""Saving and restoring everything that a run needs to continue as if it had never stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from unipic2_jax.core.addresses import as_path, is_address
from unipic2_jax.core.errors import ConfigError, TrainingError
from unipic2_jax.parallel.compat import orbax, orbax_v1
from unipic2_jax.parallel.processes import is_lost_peer, is_main, max_over_processes
from unipic2_jax.parallel.rules import shardings

ocp, v1 = orbax(), orbax_v1()

VERIFY_BYTES = 1 << 28  # read back at a time


class Checkpoints:
    """The numbered checkpoints of a run's states, and the parameters each stage starts from.

    A checkpoint is a directory that appears whole or not at all (Orbax writes beside it and commits at the end), so a
    process may die at any moment. It holds the state, a JSON record, and a checksum per leaf, because storage damage
    in array data is otherwise read back in silence. `keep` of them stay; an older one goes when a newer one has been read
    back and found right, so there must be room for `keep` + 1, and one more for what is saved while the last is being read.
    Those of multiples of `keep_every` never go.

    An asynchronous save copies the state and is written while training goes on; what it could not write is said at the
    next save. On a CPU saves are synchronous unless `asynchronous` says otherwise: the copy costs what writing does there.
    In both cases the first process reads back what was written while training goes on, and the next save waits for it.
    `written` is called when one is whole. Several processes may write to an address, by Orbax itself.
    """

    def __init__(
        self,
        folder: Path | str,
        keep: int,
        keep_every: int = 0,
        *,
        log: Callable[[str], None] = print,
        asynchronous: bool | None = None,
        written: Callable[[], None] = lambda: None,
    ):
        # Orbax logs each phase of each save; the loop says itself what was saved.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = as_path(folder) if is_address(folder) else Path(folder).absolute()
        self.log, self.whole = log, written
        (self.folder / "states").mkdir(parents=True, exist_ok=True)
        self.keep, self.keep_every, self.verified = keep, keep_every, set()
        self.written: int | None = None  # a checkpoint that is not being read back yet
        self.readings: dict[int, Future[str | None]] = {}
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="read back")
        # Orbax has one number for what it does in a process: a load that begins inside a save changes it, and the save then
        # writes into a folder before that is made, which fails.
        self.orbax = threading.Lock()
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=jax.default_backend() != "cpu" if asynchronous is None else asynchronous,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=_processes(),
        )
        self.manager = ocp.CheckpointManager(self.folder / "states", options=options)

    def save(self, step: int, state: Any, record: dict[str, Any], *, last: bool = False) -> None:
        """Saves `state` (a pytree of arrays) and `record` (JSON) as number `step`, replacing what that number had.

        Args:
          last: the process leaves then, and waits for nothing to be read back: the next start reads what it continues from.

        Raises:
          TrainingError: when it, or the one before, could not be written.
        """
        self._settle(patient=not last)
        if step in self.manager.all_steps():
            self.manager.delete(step)
            self.verified.discard(step)
        args = {
            "state": ocp.args.StandardSave(state),
            "record": ocp.args.JsonSave({**record, "checksums": checksums(state)}),
        }
        with self._writing(), self.orbax:
            self.manager.save(step, args=ocp.args.Composite(**args), force=True)
        if not last:
            self.written = step
            self.read_back()

    def read_back(self) -> None:
        """Begins to read back in a thread what has been written, and does nothing while it is; call it between two steps."""
        if self.written is not None and is_main() and not self.saving():
            self.whole()
            self.readings[self.written] = self.reader.submit(self._damaged, self.written)
            self.written = None

    def wait(self) -> None:
        """Returns when what was saved is on disk.

        Raises:
          TrainingError: when it could not be written.
        """
        with self._writing():
            self.manager.wait_until_finished()

    def saving(self) -> bool:
        """Whether a save is being written in the background."""
        return self.manager.is_saving_in_progress()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have many kinds; whichever it is, nothing was saved
            if is_lost_peer(error):
                raise
            reason = " ".join(str(error).split())[:300]
            steps = self.steps()
            rest = f"the newest complete one is {self.path(steps[-1])}" if steps else "there is no complete one yet"
            raise TrainingError(
                f"A checkpoint could not be written to {self.folder} ({reason}); {rest}: make room there or repair the "
                "storage, then run the same command."
            ) from error

    def _settle(self, patient: bool = True) -> None:
        """Waits for the last save and its being read back, and drops what is older than the ones to keep.

        Without patience it does nothing when what was saved is still being read.
        """
        self.wait()
        self.read_back()
        steps = self.steps()
        if steps and steps[-1] not in self.verified:
            reading = self.readings.pop(steps[-1], None)
            if not patient and max_over_processes(is_main() and not (reading and reading.done())):
                return
            wrong = None
            if is_main():
                wrong = reading.result() if reading else self._damaged(steps[-1])
            if max_over_processes(wrong is not None):
                self.log(
                    f"Checkpoint {self.path(steps[-1])} was written and reads back damaged ({wrong}); it is removed."
                )
                self.manager.delete(steps.pop())
            else:
                self.verified.add(steps[-1])
        for step in steps[: -self.keep]:
            if not self.keep_every or step % self.keep_every:
                self.manager.delete(step)

    def _damaged(self, step: int) -> str | None:
        """What of a checkpoint is not as it was saved, read on this host in pieces; None: nothing."""
        try:
            sums = self.record(step)["checksums"]
            stored = v1.metadata(self.path(step), checkpointable_name="state").metadata
            leaves, structure = jax.tree_util.tree_flatten_with_path(stored)
            names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
            # What Orbax cannot read it leaves out of the description, without a word.
            if missing := sorted(sums.keys() - set(names)):
                return f"{missing[0]} is not there"
            for piece in _pieces([leaf for _, leaf in leaves]):
                wanted = [
                    np.empty(leaf.shape, leaf.dtype) if number in piece else v1.PLACEHOLDER
                    for number, (_, leaf) in enumerate(leaves)
                ]
                read = self._load(step, structure.unflatten(wanted))
                for number in piece:
                    if host_checksum(jax.tree.leaves(read)[number]) != sums.get(names[number]):
                        return f"{names[number]} has another checksum than when it was saved"
        except Exception as error:  # whatever a damaged file makes the readers raise
            return str(error).strip().split("\n")[0][:200]
        return None

    def steps(self) -> list[int]:
        """The numbers of the complete checkpoints, ascending."""
        return sorted(self.manager.all_steps())

    def path(self, step: int) -> Path:
        """Where checkpoint `step` lies."""
        return self.folder / "states" / str(step)

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of checkpoint `step`, read by this process alone."""
        return json.loads((self.path(step) / "record" / "metadata").read_text())

    def _load(self, step: int, wanted: Any) -> Any:
        """Leaves of the state of checkpoint `step`, as descriptions say, read without waiting for other processes."""
        me = jax.process_index()
        alone = v1.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        with self.orbax, v1.Context(multiprocessing_options=alone):
            return v1.load(self.path(step), wanted, checkpointable_name="state")

    def restore(self, step: int, like: Any) -> Any:
        """The state of checkpoint `step` with the structure, dtypes and shardings of `like`.

        Raises:
          ValueError: when a leaf is not what was saved. Whatever it is, it raises in all processes or in none.
        """
        sums = _everywhere(lambda: self.record(step)["checksums"])
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = _everywhere(lambda: self._load(step, abstract))
        if wrong := [name for name, value in checksums(state).items() if value != sums.get(name)]:
            raise ValueError(f"{self.path(step)} is damaged: {wrong[0]} has another checksum than when it was saved.")
        return state

    def restore_newest(self, like_of: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], Any] | None:
        """The record and state of the newest checkpoint that can be read, or None when there is no checkpoint.

        Damaged checkpoints are named in the log, passed over, and removed once an older one has been read.

        Args:
          like_of: from a checkpoint's record to a state of the structure to restore. Its arrays are given up, so that there is
            one state in memory.

        Raises:
          ConfigError: when there are checkpoints and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                record = _everywhere(lambda step=step: self.record(step))
            except Exception as error:  # whatever a damaged file makes the reader raise
                self._skip(step, error)
                continue
            like = like_of(record)
            try:
                state = self.restore(step, like)
            except Exception as error:
                self._skip(step, error)
                continue
            for damaged in self.steps():
                if damaged > step:
                    self.manager.delete(damaged)
            for leaf in jax.tree.leaves(like):
                leaf.delete()
            self.verified.add(step)
            return record, state
        if steps:
            raise ConfigError(
                f"None of the checkpoints in {self.folder} can be read; delete the folder to start from the beginning."
            )
        return None

    def _skip(self, step: int, error: Exception) -> None:
        if is_lost_peer(error):
            raise error
        reason = str(error).strip().split("\n")[0][:200]
        self.log(f"Checkpoint {self.path(step)} cannot be read ({reason}); the one before it is used.")

    def save_params(self, index: int, params: dict[str, Any]) -> None:
        """Saves the parameters with which stage `index` starts and the run did not; once.

        Raises:
          TrainingError: when they, or the checkpoint before, could not be written.
        """
        path = self.folder / "params" / str(index)
        if path.exists() or not params:
            return
        self.wait()
        with self._writing(), self.orbax, ocp.StandardCheckpointer(multiprocessing_options=_processes()) as writer:
            writer.save(path, {"params": params, "checksums": _device_checksums(params)})

    def load_params(
        self, index: int, like: dict[str, Any], mesh: jax.sharding.Mesh
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """`like` with what `save_params` saved for stage `index`, on the mesh.

        Returns:
          The parameters, and by path those that were saved for networks which `like` does not have.

        Raises:
          ConfigError: when the folder is damaged, or holds a parameter of another shape than `like`.
        """
        path = self.folder / "params" / str(index)
        if not path.exists():
            return like, {}
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=_processes()) as reader:
                # By their own description, since a group may be there that `like` does not have (a LoRA that is kept).
                stored = dict(reader.metadata(path).item_metadata)
                describe = lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
                saved = reader.restore(path, jax.tree.map(describe, stored, shardings(mesh, stored)))
            found = checksums(saved["params"])
            if found != checksums_to_dict(saved["checksums"]):
                raise ValueError("a checksum differs")
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise ConfigError(
                f"The parameters at the start of stage {index} in {path} cannot be read ({reason}); "
                "delete the run's folder to start from the beginning."
            ) from error
        known, found = (traverse_util.flatten_dict(tree, sep="/") for tree in (like, saved["params"]))
        # A group of its own (a LoRA that is kept) goes along; other networks of a group are another model's.
        carried = {name: leaf for name, leaf in found.items() if name not in known and name.split("/")[0] in like}
        for name, leaf in found.items():
            if name in known and leaf.shape != known[name].shape:
                raise ConfigError(
                    f"The stages before stage {index} trained {name} of shape {leaf.shape} and its model has "
                    f"{known[name].shape}; give both stages models of one size."
                )
        ours = {name: leaf for name, leaf in found.items() if name not in carried}
        return traverse_util.unflatten_dict(known | ours, sep="/"), carried

    def close(self) -> None:
        """Finishes pending saves and stops the threads that write and read."""
        self._settle()
        self.reader.shutdown()
        self.manager.close()


def _processes() -> ocp.options.MultiprocessingOptions:
    """All processes, by name: Orbax then meets them through JAX's service instead of a computation on the devices.

    Its own threads would start that between those of the training, in another order in every process.
    """
    count = jax.process_count()
    return ocp.options.MultiprocessingOptions(active_processes=set(range(count)) if count > 1 else None)


def _everywhere(read: Callable[[], Any]) -> Any:
    """What `read` returns when it does in every process; else every process raises."""
    found = failure = None
    try:
        found = read()
    except Exception as error:
        failure = error
    if max_over_processes(failure is not None):
        raise failure or ValueError("another process could not read it")
    return found


def checksums(tree: Any) -> dict[str, int]:
    """A checksum for every leaf by its path: the wrapped sum of its bits, exact in any order and on any sharding."""
    return checksums_to_dict(_device_checksums(tree))


def checksums_to_dict(sums: Any) -> dict[str, int]:
    """A tree of scalar checksums as {path: int}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(sums))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): int(value) for path, value in leaves}


def host_checksum(x: np.ndarray) -> int:
    """What `checksums` has for an array, computed without a device."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]
    return int(np.add.reduce(np.ravel(x).view(unsigned), dtype=np.uint32))


def _pieces(leaves: list[Any]) -> Iterator[set[int]]:
    """Numbers of leaves that are read together: of `VERIFY_BYTES`, and one at least."""
    piece, size = set(), 0
    for number, leaf in enumerate(leaves):
        nbytes = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        if piece and size + nbytes > VERIFY_BYTES:
            yield piece
            piece, size = set(), 0
        piece.add(number)
        size += nbytes
    if piece:
        yield piece


@jax.jit
def _device_checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def _checksum(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize])
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
