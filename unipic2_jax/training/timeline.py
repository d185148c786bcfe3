"""What a step's time went into: spans of the training's thread and of those beside it, as `metrics.jsonl` keeps them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

# Name, and seconds from the beginning of the turn to the span's beginning and end.
Span = tuple[str, float, float]


class Timeline:
    """Spans of one turn of the loop, from any thread. What was saved or evaluated before a step belongs to its turn."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forgets the spans of the turn before."""
        self._started, self._spans = time.perf_counter(), list[Span]()

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What is done inside is a span; one that another turn has begun meanwhile is told in the turn that it ends in."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((name, started - self._started, time.perf_counter() - self._started))

    @property
    def spans(self) -> list[Span]:
        """Those that have ended, by their beginning, in milliseconds' precision."""
        ordered = sorted(self._spans, key=lambda span: span[1:])
        return [(name, round(begun, 3), round(ended, 3)) for name, begun, ended in ordered]
