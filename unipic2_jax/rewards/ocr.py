"""Text rendering: how much of the text that a prompt asks for can be read in the picture.

The score is Flow-GRPO's (yifan123/flow_grpo, `flow_grpo/ocr.py`), the reader PP-OCR by RapidOCR, which is optional
(requirements-ocr.txt) and brings its weights with it.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.rewards.base import REWARDS, Reward, Scores, check_package

# The first part of a prompt between straight or curly double quotation marks.
QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """What is to be written: the metadata's `text`, else the quoted part of the prompt.

    Raises:
      ValueError: when neither says anything.
    """
    quoted = QUOTED.search(prompt)
    text = metadata.get("text", "".join(quoted.groups("")) if quoted else "")
    if not isinstance(text, str) or not plain(text):
        raise ValueError(f"The prompt {prompt!r} names no text to write; put it in \"quotation marks\" or into 'text'.")
    return text


def plain(text: str) -> str:
    """Lower case without white space: what is compared."""
    return "".join(text.lower().split())


def similarity(read: str, wanted: str) -> float:
    """1 where the wanted text is among what was read, else 1 - min(edits, length) / length, edits after Levenshtein.

    However much else was read, it costs no more than the wanted text is long.
    """
    from rapidfuzz.distance import Levenshtein

    read, wanted = plain(read), plain(wanted)
    if wanted in read:
        return 1.0
    return 1 - min(Levenshtein.distance(read, wanted), len(wanted)) / len(wanted)


@REWARDS.register("ocr")
@dataclasses.dataclass(frozen=True)
class OCRReward(Reward):
    """Reads each picture. The detail `correct` is 1 where the whole text stands in it.

    Attributes:
      min_confidence: lines that were read with less are left out.
      threads: of one picture's reading.
    """

    min_confidence: float = 0.5
    threads: int = 1

    def __post_init__(self) -> None:
        for package in ("rapidocr_onnxruntime", "rapidfuzz"):
            check_package(package, "requirements-ocr.txt", "The reward 'ocr'")
        if not 0 <= self.min_confidence <= 1 or self.threads < 1:
            raise ValueError(
                f"The reward 'ocr' has min_confidence={self.min_confidence} and threads={self.threads}; use a share of 0 "
                "to 1 and at least one thread."
            )

    def check(self, records: Sequence[PromptRecord]) -> None:
        for record in records:
            target_text(record.prompt, record.metadata)

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        wanted = [target_text(record.prompt, record.metadata) for record in records]
        values = np.array([similarity(self.read(image), text) for image, text in zip(images, wanted, strict=True)])
        return Scores(values, {"correct": (values == 1).astype(np.float64)})

    def read(self, image: np.ndarray) -> str:
        """All lines of a uint8 [H, W, 3] image, from top to bottom, then from left to right."""
        try:
            engine = self._idle.get_nowait()
        except queue.Empty:
            engine = self._engine()
        try:
            lines, _ = engine(np.ascontiguousarray(image[..., ::-1]))  # it takes blue, green, red
        finally:
            self._idle.put(engine)
        return " ".join(text for _, text, _ in lines or ())

    @functools.cached_property
    def _idle(self) -> queue.SimpleQueue:
        """Engines that nobody uses: one keeps what it is doing in attributes, so that each call at a time needs its own."""
        return queue.SimpleQueue()

    def _engine(self) -> Any:
        from rapidocr_onnxruntime import RapidOCR

        return RapidOCR(text_score=self.min_confidence, intra_op_num_threads=self.threads, inter_op_num_threads=1)
