"""Where a run's files are: a folder, or an address with a local copy that is kept equal there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from unipic2_jax.core.addresses import Mirror, is_address
from unipic2_jax.core.errors import ConfigError, TrainingError
from unipic2_jax.parallel.processes import is_main

SEND_EVERY = 60.0  # seconds, for those who look at curves between two checkpoints
# Where Orbax writes arrays itself, so that every process can write its own.
ORBAX = ("gs", "s3")


@dataclasses.dataclass
class Workdir:
    """The files of a run.

    Attributes:
      folder: local, with everything but, where several processes write them to an address, the checkpoints.
      checkpoints: their folder, or its address.
      mirror: keeps an address equal to `folder`.
      shown: what people know it as.
    """

    folder: Path
    checkpoints: Path | str
    mirror: Mirror | None = None
    shown: str = ""
    sent: float = dataclasses.field(default_factory=time.monotonic)

    def name(self, path: Path) -> str:
        """How messages name what lies in `folder`."""
        inside = path.relative_to(self.folder).as_posix()
        return f"{self.shown}/{inside}" if inside != "." else self.shown

    def send(self) -> None:
        """Begins to send what has changed. Nothing to do for a folder."""
        if self.mirror is not None:
            self._told(self.mirror.begin)
            self.sent = time.monotonic()

    def send_sometimes(self) -> None:
        """`send` once a minute."""
        if time.monotonic() - self.sent > SEND_EVERY:
            self.send()

    def before_checkpoint(self) -> None:
        """Waits for what is being sent, nothing of which may be removed before. Where Orbax writes the checkpoint to the address itself
        the records of its steps go there first, so that a checkpoint never has steps that metrics.jsonl lacks."""
        if self.mirror is not None:
            beside = self.checkpoints != self.folder / "checkpoints"
            self._told(self.mirror.push if beside else self.mirror.settle)

    def complete(self) -> None:
        """Returns when everything is there."""
        if self.mirror is not None:
            self._told(self.mirror.push)

    def busy(self) -> bool:
        """Whether something is being sent."""
        return self.mirror is not None and self.mirror.busy()

    def _told(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            raise TrainingError(
                f"{error} The same command continues from the last checkpoint that is there."
            ) from error


@contextlib.contextmanager
def opened(workdir: str | os.PathLike) -> Iterator[Workdir]:
    """The workdir of a run while it lasts.

    Raises:
      ConfigError: when nothing can be written there.
    """
    address = os.fspath(workdir)
    if not is_address(address):
        folder = Path(workdir)
        check_writable(folder)
        yield Workdir(folder, folder / "checkpoints", None, str(folder))
        return
    several = jax.process_count() > 1
    if several and address.split("://")[0] not in ORBAX:
        raise ConfigError(
            f"Several processes cannot write their checkpoints to {address}: Orbax does to gs:// and s3://, and to folders that all see."
        )
    try:
        left_out = ("checkpoints/",) if several else ()
        mirror = Mirror(address, writes=is_main(), part=jax.process_index(), left_out=left_out)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--workdir: {error}") from error
    shown = address.rstrip("/")
    try:
        yield Workdir(
            mirror.folder, f"{shown}/checkpoints" if several else mirror.folder / "checkpoints", mirror, shown
        )
    finally:
        mirror.close()


def check_writable(folder: Path) -> None:
    """Makes the folder of a run, before anything is computed.

    Raises:
      ConfigError: when nothing can be written there, or it is what remains of an address in a path.
    """
    if re.match(r"\w{2,}:/", str(folder)):  # Path makes one slash of two
        raise ConfigError(f"The workdir {folder} is an address whose slashes were lost; give it as a string.")
    probe = folder / f".writable{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"The workdir {folder} cannot be written ({error.strerror}); repair it or choose another --workdir."
        ) from error
