"""Files behind addresses (gs://bucket/folder, s3://..., memory://...): the one door to fsspec, which speaks their protocols.

fsspec rather than etils' epath, which Orbax uses: epath knows four protocols and reaches them through fsspec itself. An object store
has neither appending nor renaming, and most readers here map files into memory, so that everything works on local copies: what is read
is fetched once (`fetched`), a folder that is written goes there whole (`uploaded`), and a run's folder is a local one that is kept equal
there from checkpoint to checkpoint (`Mirror`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from unipic2_jax.core.errors import nearest
from unipic2_jax.core.files import to_text, write_text

# Files that go at the same time: an object store is fast in many streams.
STREAMS = 8
# Bytes of a file that is read whole before it is sent; those that are appended to meanwhile are, however large they are.
AT_ONCE = 1 << 24
GROWING = (".jsonl", ".txt", ".log")
EVENTS = "events.out.tfevents"
# What a mirror says is there; written last.
MANIFEST = "mirror.json"
# Of files that are being written, by us and by Orbax.
UNFINISHED = re.compile(r"\.part(\d|\b)|\.partial$|\.writable|\.writing-|orbax-checkpoint-tmp")
_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]+://.")


def is_address(source: Any) -> bool:
    """Whether this is an address and no path."""
    return isinstance(source, str) and bool(_ADDRESS.match(source))


def as_path(address: str) -> Path:
    """The path object with which Orbax writes to an address itself: etils' epath, which knows gs, s3, az and hf."""
    from etils import epath

    return epath.Path(address)


def cache_folder() -> Path:
    """Where local copies are: $UNIPIC2_CACHE, or ~/.cache/unipic2_jax."""
    return Path(os.environ.get("UNIPIC2_CACHE") or Path.home() / ".cache" / "unipic2_jax").absolute()


def filesystem(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    Raises:
      ValueError: for a protocol that is unknown, or whose package is not installed.
    """
    import fsspec

    protocol = address.split("://")[0]
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:  # fsspec says which package it is
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}.get(protocol)
        install = f"pip install {package}" if package else str(error).strip().rstrip(".")
        raise ValueError(f"The address {address} needs {package or 'a package that is missing'}: {install}.") from error
    except ValueError as error:
        known = fsspec.available_protocols()
        raise ValueError(f"The protocol of {address} is unknown to fsspec{nearest(protocol, known)}") from error


@contextlib.contextmanager
def _told(address: str, what: str) -> Iterator[None]:
    """What a store's client raises, which has many kinds, as one sentence."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
        raise OSError(
            f"{address} cannot be {what} ({reason}); check the address, your permissions there and the connection."
        ) from error


def fetched(address: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """A local copy of a file or folder. What is there already and has not changed is not fetched again.

    Args:
      wanted: which of a folder's files, by their path in it.

    Raises:
      FileNotFoundError: when there is nothing.
      OSError: when it cannot be read.
      ValueError: see `filesystem`.
    """
    fs, path = filesystem(address)
    place = cache_folder() / "addresses" / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
    with _told(address, "read"):
        if fs.isfile(path):
            found, name = {path.rsplit("/", 1)[-1]: fs.info(path)}, path.rsplit("/", 1)[-1]
        else:
            found, name = _listed(fs, path), ""
    if not found:
        raise FileNotFoundError(f"There is no file at {address}; check the address.")
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # the processes of a machine share the copy
        record = place / ".fetched.json"
        had = json.loads(record.read_text()) if record.is_file() else {}
        marks = {file: _mark(info) for file, info in found.items() if wanted(file)}
        new = {file: mark for file, mark in marks.items() if had.get(file) != mark or not (place / file).is_file()}
        for file in had.keys() - found.keys():
            (place / file).unlink(missing_ok=True)
        kept = {file: mark for file, mark in had.items() if file in found and file not in new}

        def get(file: str) -> str:
            target = place / file
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.part")
            fs.get_file(found[file]["name"], str(part))
            os.replace(part, target)
            return file

        with _told(address, "read"), ThreadPoolExecutor(STREAMS) as pool:
            bar = tqdm(
                pool.map(get, new), total=len(new), unit="file", desc=f"fetching {address}", disable=not new or None
            )
            for file in bar:
                kept[file] = new[file]
                write_text(record, json.dumps(kept))
        write_text(record, json.dumps(kept))
    return place / name if name else place


def _listed(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """What is below a folder, by path in it."""
    root = path.rstrip("/")
    try:
        below = fs.find(root, detail=True)
    except FileNotFoundError:
        return {}
    found = {name[len(root) :].lstrip("/"): info for name, info in below.items() if name != root}
    _check_inside(found)
    return found


def _check_inside(names: Iterable[str]) -> None:
    """Whoever writes to a bucket says what its files are called: none of them may leave the local folder."""
    if outside := next((name for name in names if name.startswith("/") or ".." in name.split("/")), None):
        raise ValueError(f"the name {outside!r} leads out of the folder")


def _mark(info: dict[str, Any]) -> list[str]:
    """What changes when a file does, of what a store says about it."""
    names = (
        "size",
        "etag",
        "ETag",
        "md5Hash",
        "generation",
        "mtime",
        "updated",
        "LastModified",
        "last_modified",
        "created",
    )
    return [f"{name}={info[name]}" for name in names if info.get(name) is not None]


def fetched_files(address: str, suffixes: Collection[str], beside: bool = False) -> str:
    """Local copies of the files that an address means: a file, those of a folder with these suffixes, or those of a glob.

    Args:
      beside: with all that lies in its folder, as the pictures which a manifest names.

    Returns:
      The same as a local path, or glob.
    """
    fs, path = filesystem(address)
    folder, _, last = address.rstrip("/").rpartition("/")
    if "*" in address or "?" in address:
        folder = re.split(r"/[^/]*[*?]", address)[0]
        root = filesystem(folder)[1].rstrip("/")
        with _told(address, "read"):
            names = {name[len(root) :].lstrip("/") for name in fs.glob(path)}
        local = fetched(folder, (lambda name: True) if beside else names.__contains__)
        return f"{local}{address[len(folder) :]}"
    with _told(address, "read"):
        is_file = fs.isfile(path)
    if is_file:
        return str(fetched(folder) / last if beside else fetched(address))
    return str(fetched(address, lambda name: beside or name.lower().endswith(tuple(suffixes))))


def local(source: Any) -> Any:
    """A copy of what an address means; anything else as it is."""
    return str(fetched(source)) if is_address(source) else source


@contextlib.contextmanager
def uploaded(target: Any) -> Iterator[Path]:
    """A folder to write: `target`, or a local one that is put there when it is complete."""
    if not is_address(target):
        yield Path(target)
        return
    fs, path = filesystem(target)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        yield Path(scratch)
        with _told(target, "written"), ThreadPoolExecutor(STREAMS) as pool:
            files = [file for file in sorted(Path(scratch).rglob("*")) if file.is_file()]
            list(pool.map(lambda file: _put(fs, file, f"{path}/{file.relative_to(scratch).as_posix()}"), files))


@contextlib.contextmanager
def continued(target: str) -> Iterator[Path]:
    """A folder to go on with: `target`, or what an address has, which is sent there again however the work ends."""
    if not is_address(target):
        yield Path(target)
        return
    mirror = Mirror(target)
    try:
        yield mirror.folder
    finally:
        try:
            mirror.push()
        finally:
            mirror.close()


def _put(fs: Any, file: Path, target: str) -> None:
    """Sends a file. One that others may be writing to is read first, so that what goes is of one moment."""
    if file.stat().st_size <= AT_ONCE or file.suffix in GROWING or file.name.startswith(EVENTS):
        _write(fs, target, file.read_bytes())
    else:
        _made(fs, target)
        fs.put_file(str(file), target)


def _write(fs: Any, target: str, content: bytes) -> None:
    _made(fs, target)
    fs.pipe_file(target, content)


def _made(fs: Any, target: str) -> None:
    """Makes the folder of a file, which an object store has not."""
    if "file" in fs.protocol:
        fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)


class Mirror:
    """A local folder and an address that is kept equal to it, one whole state after another.

    The address has the files, and `mirror.json`, which names them. That is written after the files of a state, and what it names no more
    is deleted after it, so that a process may die at any moment. A file that grows, as metrics.jsonl, is sent whole each time.

    Attributes:
      folder: the local one, on this machine's disk. It is emptied and filled with what the address has.

    Raises:
      ValueError: see `filesystem`.
      OSError: when the address cannot be written, or another process of this machine has it.
    """

    def __init__(self, address: str, *, writes: bool = True, part: int = 0, left_out: Collection[str] = ()):
        self.address, self.writes, self.left_out = address.rstrip("/"), writes, tuple(left_out)
        self.fs, self.root = filesystem(self.address)
        self.root = self.root.rstrip("/")
        digest = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        place = cache_folder() / "runs" / f"{digest}-{part}"
        place.mkdir(parents=True, exist_ok=True)
        # The name that messages and reports have.
        self.folder = place / self.address.rsplit("/", 1)[-1]
        self.lock = FileLock(place / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(
                f"Another process of this machine works in {address}; end it or choose another address."
            ) from error
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self.sending: Future[None] | None = None
        self.sent: dict[str, tuple[int, int]] = {}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        try:
            with _told(self.address, "read"):
                self._pull()
            if self.writes:
                with _told(self.address, "written"):
                    _write(self.fs, f"{self.root}/.writable", b"")
                    self.fs.rm_file(f"{self.root}/.writable")
        except OSError:
            self.close()
            raise

    def _pull(self) -> None:
        at = f"{self.root}/{MANIFEST}"
        names = json.loads(self.fs.cat_file(at))["files"] if self.fs.exists(at) else []
        _check_inside(names)
        names = [name for name in names if not name.startswith(self.left_out or "\0")]

        def get(name: str) -> None:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(f"{self.root}/{name}", str(self.folder / name))

        with ThreadPoolExecutor(STREAMS) as pool:
            for _ in tqdm(
                pool.map(get, names), total=len(names), desc=f"fetching {self.address}", disable=not names or None
            ):
                pass
        self.sent = {name: state for name, state in self._files().items() if name in names}

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of what is whole, by name."""
        found = {}
        for file in self.folder.rglob("*"):
            name = file.relative_to(self.folder).as_posix()
            if UNFINISHED.search(name) or name.startswith(self.left_out or "\0"):
                continue
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                state = file.stat()
                if file.is_file():
                    found[name] = (state.st_size, state.st_mtime_ns)
        return found

    def begin(self) -> None:
        """Begins to send what has changed, in a thread, unless it is being done already."""
        if self.writes and not self.busy():
            self.settle()
            self.sending = self.thread.submit(self.send)

    def busy(self) -> bool:
        """Whether something is being sent."""
        return self.sending is not None and not self.sending.done()

    def settle(self) -> None:
        """Waits for what is being sent.

        Raises:
          OSError: when it could not be written.
        """
        if self.sending is not None:
            sending, self.sending = self.sending, None
            sending.result()

    def push(self) -> None:
        """Sends what has changed, and returns when all of it is there.

        Raises:
          OSError: when it cannot be written.
        """
        if self.writes:
            self.settle()
            self.thread.submit(self.send).result()

    def send(self) -> None:
        """The same in the thread that calls."""
        with _told(self.address, "written"):
            files = self._files()
            changed = [name for name, state in files.items() if self.sent.get(name) != state]
            with ThreadPoolExecutor(STREAMS) as pool:
                for name, went in zip(changed, pool.map(self._put, changed)):
                    if not went:
                        del files[name]
            _write(self.fs, f"{self.root}/{MANIFEST}", to_text({"files": sorted(files)}).encode())
            for name in self.sent.keys() - files.keys():
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(f"{self.root}/{name}")
            self.sent = files

    def _put(self, name: str) -> bool:
        """Sends a file; False: it was removed meanwhile, as an old checkpoint is while a newer one goes."""
        try:
            _put(self.fs, self.folder / name, f"{self.root}/{name}")
        except FileNotFoundError:
            if (self.folder / name).exists():
                raise
            return False
        return True

    def close(self) -> None:
        """Frees the local folder."""
        self.thread.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release()
