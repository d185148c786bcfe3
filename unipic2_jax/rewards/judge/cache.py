"""Answers of a judge, kept on disk: what was asked once is not paid for again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unipic2_jax.rewards.base import RewardError

FILE = "answers.sqlite3"
LONGEST_WAIT = 30.0  # seconds for other processes that write


class AnswerCache:
    """Answers by the SHA-256 of their question; threads and processes of one machine may share a folder.

    Raises:
      OSError: when there can be no such file.
    """

    def __init__(self, folder: str):
        self.file = Path(folder) / FILE
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise OSError(f"The judge's cache {self.file} cannot be used ({error}); give another folder.") from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # One for each use: connections belong to threads, and calls come from new ones each time.
        with contextlib.closing(sqlite3.connect(self.file, timeout=LONGEST_WAIT)) as database, database:
            yield database

    def get(self, key: str) -> str | None:
        """The answer, or None.

        Raises:
          RewardError: when the file cannot be read.
        """
        return self._do(
            lambda database: (
                database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone() or [None]
            )[0]
        )

    def put(self, key: str, answer: str) -> None:
        """Keeps an answer; of two, the later one.

        Raises:
          RewardError: when the file cannot be written.
        """
        self._do(lambda database: database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer)))

    def _do(self, use: Callable[[sqlite3.Connection], Any]) -> Any:
        try:
            with self._open() as database:
                return use(database)
        except sqlite3.Error as error:
            raise RewardError(f"The judge's cache {self.file} cannot be used ({error}); see to its disk.") from error


def question_key(version: int, question: Any) -> str:
    """SHA-256 of what is asked: template version, model, texts and the pictures' bytes."""
    return hashlib.sha256(json.dumps([version, question], sort_keys=True).encode()).hexdigest()
