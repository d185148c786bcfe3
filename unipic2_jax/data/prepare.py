"""From pictures as people keep them to prepared shards: decode, filter, drop duplicates, crop to buckets, write.

Records are worked through in order, in chunks of `shard_size`. A chunk's shards are written under temporary names, then
renamed, then noted in the journal; so a run that is killed at any moment goes on after its last whole chunk, and what it
writes does not depend on interruptions or on the number of workers:

    OUT/journal/settings.json             what is prepared, and how; a run with other settings is refused
    OUT/journal/00000.json                what became of the records of a chunk
    OUT/1x1-00000.array_record            see data.prepared
    OUT/dropped.jsonl                     name, reason and message of each record that was left out
    OUT/dataset.json                      written last, when the journal is removed
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from unipic2_jax.core.files import to_text, write_text
from unipic2_jax.data.buckets import Bucket, bucket_size
from unipic2_jax.data.examine import DIGEST_BYTES, Dropped, Examine, Kept, Settings, examined_records
from unipic2_jax.data.prepared import INDEX, PreparedIndex, Shard, pack
from unipic2_jax.data.records import RecordSource
from unipic2_jax.pictures.decode import BadRecord

JOURNAL, DROPPED = "journal", "dropped.jsonl"
SUFFIX, UNFINISHED = ".array_record", ".part"
# Bad records that are forgiven without being asked: this part of all, and at least so many.
BAD_PART, BAD_LEAST = 0.01, 10


class Encoder(Protocol):
    """A model's part in preparation, which the parent process does.

    Attributes:
      settings: what its results depend on, as JSON.
      batch_size: so many examples are given at a time, at the end of a chunk fewer.
      multiple: pixels that every edge must be a multiple of.
    """

    settings: Mapping[str, Any]
    batch_size: int
    multiple: int

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Arrays to store, by name, [B, ...] each, for pictures uint8 [B, 1 + R, H, W, 3], targets first."""
        ...


def prepare(
    source: RecordSource,
    out: str | os.PathLike,
    *,
    workers: int = 0,
    max_errors: float | None = None,
    encode: Encoder | None = None,
    **settings: Any,
) -> PreparedIndex:
    """Prepares a source into a folder, or goes on where an earlier run was interrupted.

    Left out are: pictures smaller than min_size ('too-small') or longer than max_aspect ('aspect'), prompts that are empty
    ('empty-prompt') or longer than max_prompt ('long-prompt'), edits of one reference that has another aspect ratio than
    its result ('pair-size'), what is the same as an earlier record after cropping ('duplicate'), and bad records.

    Args:
      workers: processes that read and decode; with 0 threads of this process do.
      max_errors: bad records that are left out before the run stops: a number, or below 1 a part of all records. None:
        1 percent of them, and at least 10. An interrupted run may go on with another limit and other workers.
      encode: computes arrays to store beside the pictures.
      settings: fields of `Settings`.

    Returns:
      What dataset.json says. Its presence means that the folder is complete; then nothing is done.

    Raises:
      ValueError: for settings out of range, too many bad records, nothing that is kept, or a folder that holds something
        else: other files, or data of another source or of other settings.
      RuntimeError: a bug in the source.
    """
    out, wanted, total = Path(out), Settings(**settings), len(source)
    if not total:
        raise ValueError("The source has no records to prepare; name another one.")
    if workers < 0:
        raise ValueError(f"The number of workers is {workers}; give 0 for threads, or some processes.")
    if encode is not None and wanted.multiple % encode.multiple:
        raise ValueError(
            f"The model takes edges that are multiples of {encode.multiple} pixels but multiple is {wanted.multiple}; "
            f"use a multiple of {encode.multiple}."
        )
    limit = _limit(max_errors, total)
    described = _described(source, wanted, encode)
    if (out / INDEX).is_file():
        index = PreparedIndex.read(out)
        _check_same(out, index.summary.get("settings", {}), described)
        _remove_journal(out)
        print(f"{out} is complete already.", file=sys.stderr)
        return index
    progress = _Progress(out, described)
    if progress.read < total:
        examine = Examine(source, wanted, with_pixels=encode is not None)
        results = examined_records(examine, progress.read, total, workers)
        bar = tqdm(total=total, initial=progress.read, unit="record", desc=f"preparing {out.name}", disable=None)
        with contextlib.closing(results), bar:
            for _ in range(progress.read, total, wanted.shard_size):
                chunk = itertools.islice(results, wanted.shard_size)
                _prepare_chunk(_ticking(chunk, bar), progress, encode, limit)
    if not progress.kept:
        raise ValueError(
            f"None of the {total} records was kept ({_counted(progress.dropped)}); see {out / DROPPED}, and prepare them "
            "with other settings into another folder."
        )
    summary = {
        "read": progress.read,
        "kept": progress.kept,
        "dropped": dict(sorted(progress.dropped.items())),
        "settings": described,
    }
    index = PreparedIndex(wanted.resolution, wanted.multiple, tuple(progress.shards), tuple(progress.arrays), summary)
    write_text(out / INDEX, index.to_json(), durable=True)
    _remove_journal(out)
    return index


def describe(out: str | os.PathLike) -> str:
    """A table for people of what `prepare` wrote: read, kept, dropped with an example of each reason, buckets.

    Raises:
      FileNotFoundError, ValueError: the folder is not complete; see `PreparedIndex.read`.
    """
    index = PreparedIndex.read(out)
    examples: dict[str, str] = {}
    if (Path(out) / DROPPED).is_file():
        with open(Path(out) / DROPPED, encoding="utf-8") as lines:
            for drop in map(json.loads, lines):
                examples.setdefault(drop["reason"], drop["name"])
    dropped = index.summary["dropped"]
    rows = [(name, index.summary[name], "") for name in ("read", "kept")]
    rows += [("dropped", sum(dropped.values()), "")]
    rows += [(f"  {reason}", count, f"such as {examples.get(reason)}") for reason, count in dropped.items()]
    rows += [("in buckets", sum(index.buckets().values()), f"in {len(index.shards)} shard(s)")]
    for bucket, count in sorted(index.buckets().items()):
        height, width = bucket_size(bucket.aspect, index.resolution, index.multiple)
        rows.append((f"  {bucket}", count, f"{width} x {height} pixels"))
    return "\n".join(f"{name:<16}{count:>10}  {more}".rstrip() for name, count, more in rows)


def _ticking(results: Iterable[Any], bar: tqdm) -> Iterator[Any]:
    for result in results:
        yield result
        bar.update()


def _limit(max_errors: float | None, total: int) -> int:
    """How many bad records are left out before the run stops."""
    if max_errors is None:
        return max(BAD_LEAST, int(BAD_PART * total))
    if not max_errors >= 0:
        raise ValueError(f"max_errors is {max_errors}; give a number of records, or a part of them below 1.")
    return round(max_errors * total if max_errors < 1 else max_errors)


class _Progress:
    """What the journal says: everything that whole chunks have come to.

    Attributes:
      out: the folder.
      chunks, read, kept, bad: counts.
      dropped: counts by reason.
      shards: in the order they were written.
      arrays: names of what an encoder made, in a dict for their order.
      seen: digests of what was kept: about 100 bytes of memory for each.
    """

    def __init__(self, out: Path, described: Mapping[str, Any]):
        """Reads the journal, or begins one; removes what the chunk left behind in which an earlier run was killed."""
        self.out, self.journal = out, out / JOURNAL
        self.chunks = self.read = self.kept = self.bad = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self.shards: list[Shard] = []
        self.arrays: dict[str, None] = {}
        self.seen: set[str] = set()
        begun = self.journal / "settings.json"
        if begun.is_file():
            _check_same(out, json.loads(begun.read_text(encoding="utf-8")), described)
        else:
            if out.exists() and any(path != self.journal for path in out.iterdir()):
                raise ValueError(f"{out} holds other files already; give a folder that is new or empty.")
            self.journal.mkdir(parents=True, exist_ok=True)
            write_text(begun, to_text(described), durable=True)
        lines = []
        while (path := self._entry(self.chunks)).is_file():
            entry = json.loads(path.read_text(encoding="utf-8"))
            lines += [json.dumps(drop) + "\n" for drop in entry["dropped"]]
            self._count(entry)
        write_text(out / DROPPED, "".join(lines), durable=True)
        known = {shard.file for shard in self.shards}
        for path in (*out.iterdir(), *self.journal.iterdir()):
            if path.name.endswith(UNFINISHED) or (path.name.endswith(SUFFIX) and path.name not in known):
                path.unlink()

    def _entry(self, chunk: int) -> Path:
        return self.journal / f"{chunk:05d}.json"

    def _count(self, entry: Mapping[str, Any]) -> None:
        self.chunks += 1
        self.read += entry["read"]
        self.kept += entry["read"] - len(entry["dropped"])
        self.bad += entry["bad"]
        self.dropped.update(drop["reason"] for drop in entry["dropped"])
        self.shards += [Shard(file, Bucket(aspect, refs), count) for file, aspect, refs, count in entry["shards"]]
        self.arrays.update(dict.fromkeys(entry["arrays"]))
        self.seen.update(entry["digests"])

    def commit(self, entry: Mapping[str, Any]) -> None:
        """Notes a chunk whose shards have their final names."""
        write_text(self._entry(self.chunks), json.dumps(entry) + "\n", durable=True)
        self._count(entry)
        self.report(entry["dropped"])

    def report(self, dropped: Iterable[Mapping[str, str]]) -> None:
        """Adds to dropped.jsonl, which is for people: a run that goes on makes it anew from the journal."""
        with open(self.out / DROPPED, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(drop) + "\n" for drop in dropped)


def _prepare_chunk(results: Iterable[Kept | Dropped], progress: _Progress, encode: Encoder | None, limit: int) -> None:
    """Writes the shards of a chunk and commits it."""
    shards, dropped, digests, read, bad = _Shards(progress.out, progress.chunks, encode), [], {}, 0, 0
    for read, result in enumerate(results, 1):
        if isinstance(result, Kept) and (result.digest in progress.seen or result.digest in digests):
            name = result.example.name
            result = Dropped(name, "duplicate", f"{name} has the pictures and the prompt of an earlier record.")
        if isinstance(result, Kept):
            digests[result.digest] = None
            shards.add(result)
            continue
        dropped.append(result.to_json())
        bad += result.is_bad
        if progress.bad + bad > limit:
            progress.report(dropped)
            raise ValueError(
                f"{progress.bad + bad} of the first {progress.read + read} records are bad and {limit} may be, the last is "
                f"{result.name}: {result.message.rstrip('.')}; see {progress.out / DROPPED}, then correct them or go on "
                "with a higher max_errors."
            )
    written, arrays = shards.finish()
    progress.commit(
        {
            "read": read,
            "bad": bad,
            "shards": written,
            "arrays": arrays,
            "dropped": dropped,
            "digests": list(digests),
        }
    )


class _Shards:
    """The shards of one chunk, under temporary names until they are whole."""

    def __init__(self, out: Path, chunk: int, encode: Encoder | None):
        self.out, self.chunk, self.encode = out, chunk, encode
        self.writers: dict[Bucket, tuple[Path, ArrayRecordWriter]] = {}
        self.waiting: dict[Bucket, list[Kept]] = {}
        self.counts: collections.Counter[Bucket] = collections.Counter()
        self.arrays: dict[str, None] = {}

    def add(self, kept: Kept) -> None:
        """Writes an example, when enough of its bucket are there for the encoder."""
        self.waiting.setdefault(kept.bucket, []).append(kept)
        if len(self.waiting[kept.bucket]) >= (self.encode.batch_size if self.encode else 1):
            self._flush(kept.bucket)

    def _flush(self, bucket: Bucket) -> None:
        batch = self.waiting.pop(bucket)
        arrays: Mapping[str, np.ndarray] = {}
        if self.encode is not None:
            arrays = self.encode(np.stack([kept.pixels for kept in batch]), [kept.example.prompt for kept in batch])
            self.arrays.update(dict.fromkeys(arrays))
        with _writing(self.out):
            if bucket not in self.writers:
                # The process is part of the name, in case that someone starts the same command twice.
                path = self.out / f"{bucket}-{self.chunk:05d}{SUFFIX}.{os.getpid()}{UNFINISHED}"
                self.writers[bucket] = path, ArrayRecordWriter(str(path), "group_size:1")
            for row, kept in enumerate(batch):
                stored = {name: values[row] for name, values in arrays.items()}
                self.writers[bucket][1].write(pack(dataclasses.replace(kept.example, arrays=stored)))
        self.counts[bucket] += len(batch)

    def finish(self) -> tuple[list[tuple[str, str, int, int]], list[str]]:
        """Gives the shards their names: (file, aspect, references, count) of each, and the names of arrays in them."""
        for bucket in sorted(self.waiting):
            self._flush(bucket)
        written = []
        for bucket, (path, writer) in sorted(self.writers.items()):
            with _writing(self.out):
                writer.close()
            _sync(path)
            final = self.out / path.name[: path.name.index(SUFFIX) + len(SUFFIX)]
            os.replace(path, final)
            written.append((final.name, bucket.aspect, bucket.references, self.counts[bucket]))
        return written, list(self.arrays)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Errors of ArrayRecord's, which come as RuntimeError, as what they are."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"A shard in {out} cannot be written ({error}); make room, then go on.") from error


def _described(source: RecordSource, settings: Settings, encode: Encoder | None) -> dict[str, Any]:
    """What a folder was prepared from and how, as JSON: a run with another one does not belong there."""
    values = {"records": len(source), "fingerprint": _fingerprint(source), **dataclasses.asdict(settings)}
    return json.loads(json.dumps({**values, "encoder": None if encode is None else dict(encode.settings)}))


def _fingerprint(source: RecordSource) -> str:
    """Tells sources apart by a few of their records, wherever their files lie."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for number in sorted({len(source) * part // 16 for part in range(16)}):
        try:
            record = source[number]
        except BadRecord as error:
            digest.update(error.reason.encode())
            continue
        digest.update(json.dumps([number, record.prompt, len(record.references)]).encode())
        for picture in (record.image, *record.references):
            is_file = isinstance(picture, Path)
            digest.update(os.fsencode(picture.name) if is_file else np.ascontiguousarray(_buffer(picture)))
    return digest.hexdigest()


def _buffer(picture: bytes | np.ndarray) -> np.ndarray:
    return np.frombuffer(picture, np.uint8) if isinstance(picture, bytes) else picture


def _check_same(out: Path, held: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """Refuses to mix two preparations."""
    for name, value in described.items():
        if held.get(name) != value:
            what = "data of another source"
            if name not in ("records", "fingerprint"):
                what = f"data prepared with {name} {held.get(name)!r}, which is {value!r} now"
            raise ValueError(f"{out} holds {what}; give another folder, or delete this one first.")


def _counted(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))


def _sync(path: Path) -> None:
    """Waits until a file is on the disk, since the journal must not survive a power cut that a shard does not."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _remove_journal(out: Path) -> None:
    if (out / JOURNAL).is_dir():
        shutil.rmtree(out / JOURNAL)
