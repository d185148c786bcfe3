"""Conversations with images become what Qwen2.5-VL reads: transformers' tokenizer, chat template and image processor, and
shapes from a short list, so that prompts of all lengths share a few compiled programs. PyTorch is not needed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from unipic2_jax.data.text import check_unicode
from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig, mrope_positions, text_positions
from unipic2_jax.models.qwen.vision import Array, VisionInput, pack_images
from unipic2_jax.models.tokenizer_files import save_tokenizer
from unipic2_jax.pictures.decode import to_pil

ROLES = ("system", "user", "assistant")
IMAGE_TOKEN, END_OF_TURN = "<|image_pad|>", "<|im_end|>"
# What the template says where no message is the system's; the published scripts take it out.
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LEAST_TOKENS = 16
# Longer edge by shorter edge that Qwen2-VL's image processor takes.
MAX_ASPECT = 200

# One message as transformers writes it: {'role': ..., 'content': text or [{'type': 'text' | 'image', ...}, ...]}.
Message = Mapping[str, Any]


class VLMInput(NamedTuple):
    """A batch for `Qwen2_5_VL`, padded on the left: ids and validity [B, T], positions [B, 3, T], images or None.

    The batch leads every array, so that rows can be taken, repeated and split over devices without knowing which is which.
    """

    input_ids: Array
    positions: Array
    valid: Array
    vision: VisionInput | None


def user_message(pictures: Sequence[Any], text: str) -> dict[str, Any]:
    """A message of the user's: pictures, then text."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def pixel_limits(least: int, most: int) -> dict[str, int]:
    """How transformers' image processor of Qwen2-VL writes limits on an image's number of pixels."""
    return {"shortest_edge": least, "longest_edge": most}


def bucket(count: int, least: int = 1) -> int:
    """`count` rounded up to one of four sizes an octave: at most a quarter more, and few different shapes."""
    step = max(least, 2 ** max((count - 1).bit_length() - 3, 0))
    return -(-count // step) * step


def _checked(picture: Image.Image) -> Image.Image:
    """A picture of a shape that can be read."""
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise ValueError(
            f"A picture of {picture.width} x {picture.height} pixels is more than {MAX_ASPECT} times as long as it is wide, which "
            "Qwen2.5-VL does not read; crop it."
        )
    return picture


@dataclasses.dataclass(frozen=True, eq=False)
class VLMProcessor:
    """Turns conversations into a `VLMInput`.

    Attributes:
      config: of the model.
      tokenizer: transformers' tokenizer, with its chat template.
      image_processor: transformers' image processor of Qwen2-VL, PIL variant.
    """

    config: Qwen2_5_VLConfig
    tokenizer: Any
    image_processor: Any

    def __post_init__(self) -> None:
        if len(self.tokenizer) > self.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens but the model knows {self.config.vocab_size}; use the "
                "tokenizer that belongs to the model."
            )
        if (token := self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) != self.config.image_token_id:
            raise ValueError(
                f"The tokenizer's {IMAGE_TOKEN} is token {token} but the model's image_token_id is "
                f"{self.config.image_token_id}; use the tokenizer that belongs to the model."
            )
        tower, pictures = self.config.vision_config, self.image_processor
        theirs = (pictures.patch_size, pictures.merge_size, pictures.temporal_patch_size)
        if theirs != (ours := (tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size)):
            raise ValueError(
                f"The image processor makes patches of (size, merge, frames) {theirs} but the model takes {ours}; use the "
                "preprocessor_config.json that belongs to the model."
            )

    @classmethod
    def load(cls, folder: str | os.PathLike, config: Qwen2_5_VLConfig) -> Self:
        """Reads tokenizer, chat template and image processor from a model's folder.

        Raises:
          FileNotFoundError: when one of them is missing.
        """
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = Path(folder)
        for name in ("tokenizer_config.json", "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} lacks {name}; copy it from the original Qwen2.5-VL folder.")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer.chat_template:
            raise FileNotFoundError(f"{folder} has no chat template; copy chat_template.jinja from the original.")
        return cls(config, tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load` reads."""
        save_tokenizer(self.tokenizer, folder)
        self.image_processor.save_pretrained(folder)

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        system_prompt: bool = True,
        mrope: bool = True,
        pixels: float | None = None,
        text_length: int | None = None,
        windows: int | None = None,
    ) -> VLMInput:
        """Prepares a batch of conversations for their next answer; arguments and errors as `with_answers`."""
        return self._prepare(conversations, None, system_prompt, mrope, pixels, text_length, windows)[0]

    def with_answers(
        self,
        conversations: Sequence[Sequence[Message]],
        answers: Sequence[str],
        *,
        system_prompt: bool = True,
        mrope: bool = True,
        pixels: float | None = None,
        text_length: int | None = None,
        windows: int | None = None,
    ) -> tuple[VLMInput, np.ndarray]:
        """Conversations with their answers, and which tokens are the answers' (with the end of the turn): bool [B, T].

        Args:
          conversations: messages of each; an image is {'type': 'image', 'image': picture, path or array}.
          system_prompt: whether the template may add its default one.
          mrope: 3-D positions; False: plain ones, as the published editing script has them.
          pixels: resize every image to about this many pixels, keeping its shape; None: the image processor's limits.
          text_length, windows: pad to so many tokens beside the images' own, and to so many vision windows; None: to the
            next of a few sizes.

        Raises:
          ValueError: for an unknown role or content, half a character, images that do not fit their places or are too long and
            narrow, or a prompt that is too long.
        """
        return self._prepare(conversations, answers, system_prompt, mrope, pixels, text_length, windows)

    def _prepare(
        self,
        conversations: Sequence[Sequence[Message]],
        answers: Sequence[str] | None,
        system_prompt: bool,
        mrope: bool,
        pixels: float | None,
        text_length: int | None,
        windows: int | None,
    ) -> tuple[VLMInput, np.ndarray]:
        texts, pictures = zip(*(self._render(messages, system_prompt) for messages in conversations))
        patches, grids = self._patches([picture for row in pictures for picture in row], pixels)
        counts = iter(int(np.prod(grid)) // self.config.vision_config.merged for grid in grids)
        prompts, room = [], 0
        for text, row in zip(texts, pictures):
            first, *rest = text.split(IMAGE_TOKEN)
            if len(rest) != len(row):
                raise ValueError(
                    f"A prompt has {len(rest)} image token(s) for {len(row)} image(s); leave {IMAGE_TOKEN} out of texts."
                )
            rest_counts = [next(counts) for _ in rest]
            room = max(room, sum(rest_counts))
            prompts.append(first + "".join(IMAGE_TOKEN * count + part for count, part in zip(rest_counts, rest)))
        spell = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # Apart, since that is how they meet when an answer is written.
        written = [[] for _ in prompts] if answers is None else [spell(answer + END_OF_TURN) for answer in answers]
        ids = [spell(prompt) + answer for prompt, answer in zip(prompts, written, strict=True)]
        answered = [len(answer) for answer in written]
        longest = max(map(len, ids))
        length = bucket(longest, LEAST_TOKENS) if text_length is None else text_length + room
        if longest > length:
            raise ValueError(f"A prompt of {longest} tokens is longer than the {length} reserved; shorten it.")
        pad = self.tokenizer.pad_token_id or 0
        input_ids = np.array([[pad] * (length - len(row)) + row for row in ids], np.int32)
        valid = np.arange(length)[None] >= length - np.array([len(row) for row in ids])[:, None]
        positions = mrope_positions(self.config, input_ids, valid, grids) if mrope else text_positions(valid)
        positions = np.ascontiguousarray(positions.transpose(1, 0, 2))
        is_answer = np.arange(length)[None] >= length - np.array(answered)[:, None]
        if not len(grids):
            return VLMInput(input_ids, positions, valid, None), is_answer
        media = {self.config.image_token_id: (patches, grids)}
        vision = pack_images(self.config.vision_config, input_ids, media, windows)
        if windows is None:
            vision = pack_images(self.config.vision_config, input_ids, media, bucket(vision.frames.shape[1]))
        return VLMInput(input_ids, positions, valid, vision), is_answer

    def _render(self, messages: Sequence[Message], system_prompt: bool) -> tuple[str, list[Image.Image]]:
        """The template's text of a conversation, one image token an image, and its images."""
        pictures = []
        for number, message in enumerate(messages):
            if message.get("role") not in ROLES:
                raise ValueError(f"The role {message.get('role')!r} is unknown; use one of {', '.join(ROLES)}.")
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            for part in content or ():
                if part.get("type") == "image":
                    pictures.append(_checked(to_pil(part["image"])))
                elif part.get("type") != "text":
                    raise ValueError(f"Content of type {part.get('type')!r} is unknown; use 'text' or 'image'.")
                else:
                    check_unicode(part["text"], f"message {number}")
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        is_default = messages[0]["role"] != "system" and text.startswith(DEFAULT_SYSTEM)
        return (text if system_prompt or not is_default else text.removeprefix(DEFAULT_SYSTEM)), pictures

    def _patches(self, pictures: Sequence[Image.Image], pixels: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Patches [N, patch_dim] and grids [I, 3] of all pictures."""
        limits = {} if pixels is None else {"size": pixel_limits(int(pixels), int(pixels))}
        made = [self.image_processor(images=[p], return_tensors="np", **limits) for p in pictures]
        if not made:
            return np.zeros((0, self.config.vision_config.patch_dim), np.float32), np.zeros((0, 3), int)
        return np.concatenate([m["pixel_values"] for m in made]), np.concatenate([m["image_grid_thw"] for m in made])

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Answers [B, N] as text, without special tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's end, and the end of a turn or of text where it has them."""
        names = (END_OF_TURN, "<|endoftext|>")
        tokens = {self.tokenizer.convert_tokens_to_ids(name) for name in names} | {self.tokenizer.eos_token_id}
        return tuple(sorted(tokens - {None, self.tokenizer.unk_token_id}))
