"""Several rewards of a batch, in the background: who is asked about what, how often, and what comes of those that fail."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from typing import Any, NamedTuple

import jax
import numpy as np
import tenacity

from unipic2_jax.data.prompts import FinitePromptSource, PromptRecord, PromptSource
from unipic2_jax.rewards.base import REWARDS, Calls, Reward, RewardError, Scores, make_reward
from unipic2_jax.rewards.combine import NORMALIZATIONS
from unipic2_jax.weights.precision import PRECISIONS, Precision

LONGEST_PAUSE = 60.0  # between two tries; a server that asks for more gets what it asks for, within `Calls.patience`
Span = Callable[[str], contextlib.AbstractContextManager[Any]]  # name -> what tells of the time that is spent inside
CALL_FIELDS = tuple(field.name for field in dataclasses.fields(Calls))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of several rewards.

    Attributes:
      reward: what scores.
      calls: how it is called.
      weight: of its score in what is maximised; 0: it is only watched.
      normalize: of `rewards.combine.NORMALIZATIONS`, before weighting.
      datasets: it is asked about records whose metadata has one of these as `dataset`; empty: about all.
    """

    reward: Reward
    calls: Calls
    weight: float = 1.0
    normalize: str = "none"
    datasets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize is '{self.normalize}'; use one of {', '.join(NORMALIZATIONS)}.")
        if self.reward.groupwise and self.calls.batch_size:
            raise ValueError("a reward of whole groups has no batch_size; leave it out.")
        if 0 < self.calls.timeout <= self.reward.request_timeout:
            raise ValueError(
                f"timeout is {self.calls.timeout:g} and request_timeout {self.reward.request_timeout:g} seconds, so that calls "
                "are given up before their requests; make timeout the longer one."
            )

    def is_about(self, record: PromptRecord) -> bool:
        """Whether the reward is asked about what was made for this record."""
        return not self.datasets or record.metadata.get("dataset") in self.datasets


def make_entries(
    rewards: Mapping[str, Mapping[str, Any]],
    mesh: jax.sharding.Mesh | None = None,
    precision: Precision = PRECISIONS["float32"],
) -> dict[str, Entry]:
    """{name: fields of `Entry`, fields of `Calls`, `kind` (the name by default), and the kind's own options}.

    Args:
      mesh, precision: of the run, for what computes on its devices; an option `precision` overrules the latter.

    Raises:
      ValueError: one sentence with the reward's name.
    """
    entries = {}
    for name, fields in rewards.items():
        options = dict(fields)
        entry_fields = {field: options.pop(field) for field in ("weight", "normalize", "datasets") if field in options}
        try:
            kind = options.pop("kind", name)
            # What computes on the mesh is called once for all, in the main thread: there is nothing to decide about its calls.
            taken = () if REWARDS.find(kind).on_mesh else CALL_FIELDS
            calls = {field: options.pop(field) for field in taken if field in options}
            if REWARDS.find(kind).on_mesh:
                options.setdefault("precision", precision)
            reward = make_reward(kind, mesh, **options)
            if isinstance(entry_fields.get("datasets"), str):
                raise ValueError(f"datasets is '{entry_fields['datasets']}'; write ('{entry_fields['datasets']}',).")
            entries[name] = Entry(reward, dataclasses.replace(reward.calls, **calls), **entry_fields)
        except ValueError as error:
            raise ValueError(f"rewards.{name}: {error}") from error
    return entries


def check_tasks(entries: Mapping[str, Entry], source: PromptSource) -> None:
    """Whether the rewards can score what a finite source asks for; an endless one is not looked through.

    Raises:
      ValueError: one sentence with the name of the reward and the place of the task.
    """
    if not isinstance(source, FinitePromptSource):
        return
    for place, record in source.tasks():
        for name, entry in entries.items():
            try:
                if entry.is_about(record):
                    entry.reward.check([record])
            except ValueError as error:
                raise ValueError(f"rewards.{name}: {place}: {error}") from error


class Scored(NamedTuple):
    """What became of a batch, by reward.

    Attributes:
      values: float64 [B]; NaN where scoring failed, and where it was not asked.
      asked: bool [B].
      details: further numbers, float64 [B], by name.
      errors: sample -> sentence.
    """

    values: dict[str, np.ndarray]
    asked: dict[str, np.ndarray]
    details: dict[str, dict[str, np.ndarray]]
    errors: dict[str, dict[int, str]]


class Scorer:
    """Asks all rewards about a batch.

    A call that raises `RewardError`, or takes too long, is tried again; when that does not help its samples have no score.
    Any other error ends the run, and calls that are still queued are not made. Threads that hang in a call after its time stay
    behind and keep no one from leaving.
    """

    def __init__(self, entries: Mapping[str, Entry]):
        self.entries = dict(entries)
        self._pools = {name: ThreadPoolExecutor(entry.calls.concurrency) for name, entry in self.entries.items()}
        self._breakers = {name: Breaker(entry.calls) for name, entry in self.entries.items()}

    def start(
        self,
        images: Sequence[np.ndarray],
        records: Sequence[PromptRecord],
        over: threading.Event | None = None,
        span: Span = contextlib.nullcontext,
    ) -> Callable[[], Scored]:
        """Begins to score uint8 [H, W, 3] images, those of a group side by side; the result waits for all scores.

        Args:
          span: in one of its name is each call of a reward, 'score NAME', and what comes before on the host, 'prepare NAME'.
          over: ends what is queued or waits for another try, once it is set; an error sets it. Batches may share one.

        Nobody is asked about what was made for a record with an `error`: its scores failed for that reason.
        """
        pending, over = {}, over or threading.Event()
        for name, entry in self.entries.items():
            asked = [i for i, record in enumerate(records) if entry.is_about(record)]
            broken = [i for i in asked if records[i].error]
            asked = [i for i in asked if not records[i].error]
            parts = _parts(entry, asked, records)
            if entry.reward.on_mesh:  # a process that has nothing to ask takes part
                parts = [asked]
            begin = self._on_mesh if entry.reward.on_mesh else self._in_thread
            pending[name] = [
                (part, begin(name, [images[i] for i in part], [records[i] for i in part], over, span)) for part in parts
            ]
            pending[name] += [([i], _Known(records[i].error)) for i in broken]

        def result() -> Scored:
            try:
                return self._collect(len(images), pending)
            except BaseException:
                over.set()
                raise

        return result

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scored:
        """`start` and its result."""
        return self.start(images, records)()

    def _in_thread(
        self,
        name: str,
        images: list[np.ndarray],
        records: list[PromptRecord],
        over: threading.Event,
        span: Span,
    ) -> Any:
        reward = self.entries[name].reward
        call = _within(span, f"score {name}", lambda: reward.score(images, records))
        return self._pools[name].submit(self._score, name, call, len(images), over)

    def _on_mesh(
        self,
        name: str,
        images: list[np.ndarray],
        records: list[PromptRecord],
        over: threading.Event,
        span: Span,
    ) -> Any:
        """What all processes have to do in the same order is done when it is asked for; what comes before begins now, in a thread."""
        reward = self.entries[name].reward
        prepare = _within(span, f"prepare {name}", lambda: reward.prepare(images, records))
        prepared = self._pools[name].submit(prepare)

        def call() -> Scores:
            given = prepared.result()
            with span(f"score {name}"):
                return reward.score_prepared(given)

        return _Later(self._score, (name, call, len(images), over))

    def _score(self, name: str, call: Callable[[], Scores], count: int, over: threading.Event) -> Scores | str:
        """Scores of one call about so many images, or the sentence that says why there are none."""
        entry, breaker = self.entries[name], self._breakers[name]
        calls = entry.calls
        if breaker.is_open():
            return f"It failed {calls.breaker} times in a row and is left alone for {calls.pause:g} seconds."

        def ask() -> Scores:
            if over.is_set():
                raise RewardError("Nobody waited for its score.")
            allowed = calls.timeout and calls.timeout + entry.reward.longest_wait(calls, count)
            scores = _in_time(allowed, call)
            if np.shape(scores.values) != (count,):
                raise RewardError(f"{np.shape(scores.values)} scores came for {count} images.")
            return scores

        try:
            scores = _tries(calls, over)(ask)
        except RewardError as error:
            if over.is_set():
                return str(error)
            # Who asks for time is alive, unless it asks for more than there is.
            breaker.count(failed=error.retry_after is None or not _has_time(calls, error))
            if _has_time(calls, error):
                return str(error)
            asked = f"asks for {error.retry_after:g} seconds, more than its patience of {calls.patience:g}"
            return f"{str(error).rstrip('.')}, and {asked}."
        breaker.count(failed=False)
        return scores

    def _collect(self, count: int, pending: Mapping[str, list[tuple[list[int], Any]]]) -> Scored:
        scored = Scored({}, {}, {}, {})
        for name, parts in pending.items():
            values, asked = np.full(count, np.nan), np.zeros(count, bool)
            details: dict[str, np.ndarray] = {}
            errors: dict[int, str] = {}
            for part, future in parts:
                asked[part] = True
                scores = future.result()
                if isinstance(scores, str):
                    errors |= dict.fromkeys(part, scores)
                    continue
                values[part] = scores.values
                errors |= {part[i]: sentence for i, sentence in scores.errors.items()}
                for detail, column in scores.details.items():
                    details.setdefault(detail, np.full(count, np.nan))[part] = column
            for group, column in zip(scored, (values, asked, details, errors)):
                group[name] = column
        return scored


@dataclasses.dataclass(frozen=True)
class _Later:
    call: Callable[..., Any]
    arguments: tuple[Any, ...]

    def result(self) -> Any:
        return self.call(*self.arguments)


@dataclasses.dataclass(frozen=True)
class _Known:
    """The result of a call that need not be made."""

    sentence: str

    def result(self) -> str:
        return self.sentence


def _within(span: Span, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, in a span of this name."""

    def timed() -> Any:
        with span(name):
            return call()

    return timed


def _parts(entry: Entry, asked: list[int], records: Sequence[PromptRecord]) -> list[list[int]]:
    """Samples of each call."""
    if entry.reward.groupwise:
        return [list(group) for _, group in itertools.groupby(asked, key=lambda i: records[i].key)]
    size = entry.calls.batch_size or max(len(asked), 1)
    return [asked[start : start + size] for start in range(0, len(asked), size)]


class Breaker:
    """Calls of all threads that failed one after the other: after `breaker` of them none is made for `pause` seconds.

    One more failure then begins another pause, a success ends it. Only the count is locked, calls overlap.
    """

    def __init__(self, calls: Calls):
        self._most, self._pause = calls.breaker, calls.pause
        self._lock, self._failed, self._until = threading.Lock(), 0, 0.0

    def is_open(self) -> bool:
        """Whether no calls are to be made now."""
        return time.monotonic() < self._until

    def count(self, failed: bool) -> None:
        """Takes notice of a call whose tries are over."""
        with self._lock:
            self._failed = self._failed + 1 if failed else 0
            opens = 0 < self._most <= self._failed
            self._until = time.monotonic() + self._pause if opens else 0.0


def _has_time(calls: Calls, error: RewardError) -> bool:
    """Whether the calls can give the other side the time that it asks for, if it does."""
    return error.retry_after is None or error.retry_after <= calls.patience


def _tries(calls: Calls, over: threading.Event) -> tenacity.Retrying:
    grows = tenacity.wait_random_exponential(calls.backoff, max=LONGEST_PAUSE)

    def wait(state: tenacity.RetryCallState) -> float:
        asked = getattr(state.outcome.exception(), "retry_after", None)
        return grows(state) if asked is None else asked

    return tenacity.Retrying(
        stop=tenacity.stop_any(tenacity.stop_after_attempt(calls.retries + 1), tenacity.stop_when_event_set(over)),
        wait=wait,
        sleep=tenacity.sleep_using_event(over),
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, RewardError) and _has_time(calls, error)),
        reraise=True,
    )


def _in_time(seconds: float, call: Callable[[], Scores]) -> Scores:
    """The call's result, in a thread that is left behind when it takes longer.

    Raises:
      RewardError: when it does.
    """
    if not seconds:
        return call()
    future: Future[Scores] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the call's own
            raise
        raise RewardError(f"No answer came within {seconds:g} seconds.") from None
