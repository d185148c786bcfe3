"""Understanding: conversations about images with Qwen2.5-VL, alone or as the reader of a MetaQuery model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from unipic2_jax.models import registry
from unipic2_jax.models.bundle import VLM_PATTERNS, find_model
from unipic2_jax.models.qwen import names as qwen
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL, Qwen2_5_VLConfig
from unipic2_jax.models.qwen.generation import GREEDY, SamplingConfig, generate
from unipic2_jax.models.qwen.processor import Message, VLMProcessor
from unipic2_jax.pictures.decode import to_pil
from unipic2_jax.weights import native
from unipic2_jax.weights.precision import check_dtype, inference_dtype


@dataclasses.dataclass(frozen=True)
class Box:
    """One object that an answer points at: (left, top, right, bottom) in pixels of the picture that was handed in."""

    label: str
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A message that was written.

    Attributes:
      text: without special tokens.
      read, written: tokens of the conversation, and of the answer with the one that ends it.
      ended: whether the model ended it; otherwise there was no more room.
    """

    text: str
    read: int
    written: int
    ended: bool


@dataclasses.dataclass(frozen=True, eq=False)
class ChatModel:
    """A vision-language model, ready to answer.

    Attributes:
      module, params: the network and its parameters.
      processor: prepares conversations.
      is_part: whether it was found in a MetaQuery model's folder.
    """

    module: Qwen2_5_VL
    params: Any
    processor: VLMProcessor
    is_part: bool = False

    @property
    def description(self) -> str:
        """What answers."""
        name = f"Qwen2.5-VL of {self.module.config.num_hidden_layers} layers"
        return f"MetaQuery ({name})" if self.is_part else name

    @classmethod
    def load(cls, source: str | os.PathLike, dtype: Any = None) -> Self:
        """Reads a Qwen2.5-VL folder or hub id, or the `vlm/` of a MetaQuery model's folder.

        Args:
          dtype: None: that of `weights.precision.inference_dtype`.

        Raises:
          FileNotFoundError: when there is none, or a part of it is missing.
          ValueError: when the folder holds a model without a vision-language model, or a file is damaged.
        """
        folder = find_model(source, VLM_PATTERNS)
        if is_part := (folder / "vlm").is_dir():
            folder = folder / "vlm"
        elif (folder / "transformer").is_dir():
            kind = "no vlm/ beside its conditioner" if (folder / "conditioner").is_dir() else "text encoders only"
            raise ValueError(f"The model folder {folder} has {kind}; name the folder of a Qwen2.5-VL to chat with.")
        if (name := registry.class_name(folder)) != Qwen2_5_VLConfig.CLASS_NAME:
            raise ValueError(f"{folder} holds {name or 'a model without a class'}; chat needs a Qwen2.5-VL.")
        network, config = registry.read_network(folder)
        dtype = check_dtype(inference_dtype(dtype))
        processor = VLMProcessor.load(folder, config)
        params = native.load_component(folder, qwen.rules(config), network.abstract(config), None, dtype)
        return cls(Qwen2_5_VL(config, dtype=dtype, param_dtype=dtype), params, processor, is_part)

    def __call__(self, conversations: Sequence[Sequence[Message]], **options: Any) -> list[str]:
        """The next message of every conversation, as text; options as of `write`."""
        return [answer.text for answer in self.write(conversations, **options)]

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 256,
        sampling: SamplingConfig = GREEDY,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """The next message of every conversation.

        Args:
          on_text: gets the first conversation's answer piece by piece while it is written.
        """
        batch = self.processor(conversations)
        written: list[np.ndarray] = []
        shown = ""

        def stream(tokens: np.ndarray) -> None:
            nonlocal shown
            written.append(tokens)
            text = self.processor.decode(np.concatenate(written, axis=1)[:1])[0]
            # A character of several tokens is shown when it is whole.
            if len(text) > len(shown) and not text.endswith("\ufffd"):
                on_text(text[len(shown) :])
                shown = text

        tokens = generate(
            self.module,
            {"params": self.params},
            batch.input_ids,
            batch.positions.transpose(1, 0, 2),
            batch.valid,
            batch.vision,
            max_new_tokens=max_new_tokens,
            stop_tokens=self.processor.stop_tokens,
            pad_token=self.processor.tokenizer.pad_token_id or 0,
            config=sampling,
            seed=seed,
            cache_dtype=self.module.dtype,
            on_tokens=None if on_text is None else stream,
        )
        stops = np.isin(tokens, self.processor.stop_tokens)
        ended = stops.any(axis=1)
        written = np.where(ended, stops.argmax(axis=1) + 1, tokens.shape[1])
        rows = zip(self.processor.decode(tokens), batch.valid.sum(axis=1), written, ended)
        return [Answer(text, int(read), int(count), bool(end)) for text, read, count, end in rows]

    def boxes(self, answer: str, picture: Any) -> list[Box]:
        """The boxes of an answer about `picture`, in its own pixels.

        Qwen2.5-VL writes a JSON list of {"bbox_2d": [left, top, right, bottom], "label": ...} in pixels of the picture as
        the tower saw it.

        Raises:
          ValueError: when the answer holds no such list.
        """
        picture = to_pil(picture)
        made = self.processor.image_processor(images=[picture], return_tensors="np")
        tower, (_, rows, columns) = self.module.config.vision_config, made["image_grid_thw"][0]
        scale = picture.width / (columns * tower.patch_size), picture.height / (rows * tower.patch_size)
        return [Box(label, tuple(float(v * s) for v, s in zip(box, scale * 2))) for label, box in parse_boxes(answer)]


def parse_boxes(answer: str) -> list[tuple[str, tuple[float, ...]]]:
    """(label, bbox_2d) of every entry of the first JSON list in an answer.

    Raises:
      ValueError: when there is none, or an entry is not a box.
    """
    match = re.search(r"\[.*\]", answer, re.DOTALL)
    try:
        entries = json.loads(match.group()) if match else None
    except json.JSONDecodeError as error:
        raise ValueError(f"The answer holds no whole JSON list ({error.msg}): {answer!r}; ask again.") from error
    if not isinstance(entries, list):
        raise ValueError(f"The answer holds no JSON list of boxes: {answer!r}; ask for boxes in JSON.")
    out = []
    for entry in entries:
        box = entry.get("bbox_2d") if isinstance(entry, dict) else None
        is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
        if not is_box:
            raise ValueError(f"The entry {entry!r} of the answer is not a box; ask again.")
        out.append((str(entry.get("label", "")), tuple(box)))
    return out
