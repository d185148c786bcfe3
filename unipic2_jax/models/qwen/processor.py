"""Conversations with images become what Qwen2.5-VL reads: transformers' tokenizer, chat template and image processor, and
shapes from a short list, so that prompts of all lengths share a few compiled programs. PyTorch is not needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from unipic2_jax.data.text import check_unicode
from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig, mrope_positions, text_positions
from unipic2_jax.models.qwen.pictures import Levels, Look, host_patches, resizable, seen_size
from unipic2_jax.models.qwen.vision import Array, Layout, Qwen2_5_VLVisionConfig, VisionInput, fill, lay_out
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
class Shown:
    """How the tower sees the pictures of a batch of conversations; all by the pictures' `id`.

    Attributes:
      grids: (frames, height, width) in patches.
      patches: what the host made: uint8 [N, 3 * p * p], or without `look` float [N, patch_dim].
      config: of the tower.
      look: see `Look`.
      slots: which pictures of each conversation the program makes patches of.
      seen: (height, width) of what the tower sees.
    """

    grids: Mapping[int, tuple[int, ...]]
    patches: Mapping[int, np.ndarray]
    config: Qwen2_5_VLVisionConfig
    look: Look | None = None
    slots: tuple[int, ...] = ()
    seen: Mapping[int, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def count(self, picture: Any) -> int:
        """Patches of a picture."""
        return math.prod(self.grids[id(picture)])

    def tokens(self, picture: Any) -> int:
        """Merged tokens of a picture."""
        return self.count(picture) // self.config.merged

    def packed(
        self, image_token: int, input_ids: np.ndarray, pictures: Sequence[Sequence[Any]], windows: int | None
    ) -> VisionInput:
        """The pictures of every conversation, laid out in windows; `windows` as of `VLMProcessor.with_answers`."""
        media = {image_token: np.array([self.grids[id(p)] for row in pictures for p in row])}
        layout = lay_out(self.config, input_ids, media, windows)
        if windows is None and (wanted := bucket(layout.frames.shape[1])) > layout.frames.shape[1]:
            layout = lay_out(self.config, input_ids, media, wanted)
        return VisionInput(self._patches(layout, pictures), layout.places, layout.frames, layout.tokens)

    def _patches(self, layout: Layout, pictures: Sequence[Sequence[Any]]) -> Any:
        shape = layout.source.shape
        if self.look is None:
            floats = np.zeros((*shape, self.config.patch_dim), np.float32)
            for own, source, row in zip(floats, layout.source, pictures):
                if row:
                    fill(own, source, [self.patches[id(p)] for p in row])
            return floats
        kinds = [self._numbers(row) for row in pictures]
        index = np.full(shape, -1, np.int32) if self.slots else None
        windows: np.ndarray | None = None
        if any((host >= 0).any() for host, _ in kinds) or not self.slots:
            windows = np.zeros((*shape, self.look.patch_levels), np.uint8)
        for number, (row, (host, program)) in enumerate(zip(pictures, kinds)):
            source = layout.source[number]
            if index is not None:
                index[number] = np.where(source >= 0, program[source], -1)
            if windows is not None and (host >= 0).any():
                made = [self.patches[id(p)] for slot, p in enumerate(row) if slot not in self.slots]
                fill(windows[number], np.where(source >= 0, host[source], -1), made)
        pixels = tuple(np.stack([np.asarray(row[slot]) for row in pictures]) for slot in self.slots)
        sizes = tuple(self.seen[id(pictures[0][slot])] for slot in self.slots)
        return Levels(windows, pixels, index, sizes, self.look)

    def _numbers(self, row: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """For every patch of a row, its number among those that the host made, and among those that the program makes; -1: it is not."""
        made = np.repeat([slot in self.slots for slot in range(len(row))], [self.count(p) for p in row])
        if not len(made):  # a row without pictures still has slots, all of them empty
            return np.full(1, -1), np.full(1, -1)
        return np.where(made, -1, np.cumsum(~made) - 1), np.where(made, np.cumsum(made) - 1, -1)


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
        in_program: Collection[int] = (),
    ) -> VLMInput:
        """Prepares a batch of conversations for their next answer; arguments and errors as `with_answers`."""
        return self._prepare(conversations, None, system_prompt, mrope, pixels, text_length, windows, in_program)[0]

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
        in_program: Collection[int] = (),
    ) -> tuple[VLMInput, np.ndarray]:
        """Conversations with their answers, and which tokens are the answers' (with the end of the turn): bool [B, T].

        Args:
          conversations: messages of each; an image is {'type': 'image', 'image': picture, path or array}.
          system_prompt: whether the template may add its default one.
          mrope: 3-D positions; False: plain ones, as the published editing script has them.
          pixels: resize every image to about this many pixels, keeping its shape; None: the image processor's limits.
          text_length, windows: pad to so many tokens beside the images' own, and to so many vision windows; None: to the
            next of a few sizes.
          in_program: which pictures of a conversation, by number, are resized and cut by the program that reads them, where those of
            all conversations have one size; every size compiles, so leave out what comes in many.

        Raises:
          ValueError: for an unknown role or content, half a character, images that do not fit their places or are too long and
            narrow, or a prompt that is too long.
        """
        return self._prepare(conversations, answers, system_prompt, mrope, pixels, text_length, windows, in_program)

    def _prepare(
        self,
        conversations: Sequence[Sequence[Message]],
        answers: Sequence[str] | None,
        system_prompt: bool,
        mrope: bool,
        pixels: float | None,
        text_length: int | None,
        windows: int | None,
        in_program: Collection[int],
    ) -> tuple[VLMInput, np.ndarray]:
        converted: dict[int, Image.Image] = {}  # a picture that several conversations show is brought into shape once
        texts, pictures = zip(*(self._render(messages, system_prompt, converted) for messages in conversations))
        shown = self._shown(pictures, pixels, in_program)
        ids, answered = self._spelled(texts, [[shown.tokens(p) for p in row] for row in pictures], answers)
        room = max(sum(shown.tokens(p) for p in row) for row in pictures)
        longest = max(map(len, ids))
        length = bucket(longest, LEAST_TOKENS) if text_length is None else text_length + room
        if longest > length:
            raise ValueError(f"A prompt of {longest} tokens is longer than the {length} reserved; shorten it.")
        input_ids = np.full((len(ids), length), self.tokenizer.pad_token_id or 0, np.int32)
        for row, own in zip(input_ids, ids):
            row[length - len(own) :] = own
        valid = np.arange(length)[None] >= length - np.array([len(row) for row in ids])[:, None]
        grids = np.array([shown.grids[id(p)] for row in pictures for p in row], int).reshape(-1, 3)
        positions = mrope_positions(self.config, input_ids, valid, grids) if mrope else text_positions(valid)
        positions = np.ascontiguousarray(positions.transpose(1, 0, 2))
        is_answer = np.arange(length)[None] >= length - np.array(answered)[:, None]
        vision = shown.packed(self.config.image_token_id, input_ids, pictures, windows) if len(grids) else None
        return VLMInput(input_ids, positions, valid, vision), is_answer

    def _spelled(
        self, texts: Sequence[str], counts: Sequence[Sequence[int]], answers: Sequence[str] | None
    ) -> tuple[list[np.ndarray], list[int]]:
        """Token ids of each conversation with so many image tokens for each of its pictures, and how many of them are the answer's.

        Texts are spelled once each, with a single image token a picture: that is a token of its own, wherever it stands.
        """
        # Answers apart, since that is how they meet when one is written.
        written = [] if answers is None else [answer + END_OF_TURN for answer in answers]
        different = list(dict.fromkeys([*texts, *written]))
        spelled = dict(zip(different, self.tokenizer(different, add_special_tokens=False)["input_ids"]))
        image, ids, answered = self.config.image_token_id, [], []
        for number, (text, row) in enumerate(zip(texts, counts, strict=True)):
            own = np.array(spelled[text], np.int32)
            if (found := text.count(IMAGE_TOKEN)) != len(row):
                raise ValueError(
                    f"A prompt has {found} image token(s) for {len(row)} image(s); leave {IMAGE_TOKEN} out of texts."
                )
            times = np.ones(len(own), int)
            times[own == image] = row
            answer = spelled[written[number]] if written else []
            ids.append(np.concatenate([np.repeat(own, times), np.array(answer, np.int32)]))
            answered.append(len(answer))
        return ids, answered

    def _render(
        self, messages: Sequence[Message], system_prompt: bool, converted: dict[int, Image.Image]
    ) -> tuple[str, list[Image.Image]]:
        """The template's text of a conversation, one image token an image, and its images; what `converted` has is not converted again."""
        pictures = []
        for number, message in enumerate(messages):
            if message.get("role") not in ROLES:
                raise ValueError(f"The role {message.get('role')!r} is unknown; use one of {', '.join(ROLES)}.")
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            for part in content or ():
                if part.get("type") == "image":
                    given = part["image"]
                    if id(given) not in converted:
                        converted[id(given)] = _checked(to_pil(given))
                    pictures.append(converted[id(given)])
                elif part.get("type") != "text":
                    raise ValueError(f"Content of type {part.get('type')!r} is unknown; use 'text' or 'image'.")
                else:
                    check_unicode(part["text"], f"message {number}")
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        is_default = messages[0]["role"] != "system" and text.startswith(DEFAULT_SYSTEM)
        return (text if system_prompt or not is_default else text.removeprefix(DEFAULT_SYSTEM)), pictures

    def _shown(
        self, pictures: Sequence[Sequence[Image.Image]], pixels: float | None, in_program: Collection[int]
    ) -> Shown:
        """How the tower sees the pictures of every conversation."""
        different = {id(picture): picture for row in pictures for picture in row}
        limits = {} if pixels is None else {"size": pixel_limits(int(pixels), int(pixels))}
        if (look := self.look) is None:
            made = {
                name: self.image_processor(images=[p], return_tensors="np", **limits) for name, p in different.items()
            }
            grids = {name: tuple(map(int, m["image_grid_thw"][0])) for name, m in made.items()}
            return Shown(grids, {name: m["pixel_values"] for name, m in made.items()}, self.config.vision_config)
        size = self.image_processor.size
        bounds = limits.get("size") or {name: size[name] for name in ("shortest_edge", "longest_edge")}
        within = (bounds["shortest_edge"], bounds["longest_edge"])
        seen = {name: seen_size(p.size[::-1], look.token, within) for name, p in different.items()}
        grids = {name: look.grid(*size) for name, size in seen.items()}
        slots = []
        for slot in sorted(in_program):
            column = [row[slot] for row in pictures if slot < len(row)]
            if len(column) == len(pictures) and resizable(column, seen[id(column[0])]):
                slots.append(slot)
        left = {id(p): p for row in pictures for slot, p in enumerate(row) if slot not in slots}
        patches = {name: host_patches(p, seen[name], look) for name, p in left.items()}
        return Shown(grids, patches, self.config.vision_config, look, tuple(slots), seen)

    @functools.cached_property
    def look(self) -> Look | None:
        """How the image processor shows the tower a picture; None: it makes floats of its own."""
        return Look.of(self.image_processor)

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Answers [B, N] as text, without special tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's end, and the end of a turn or of text where it has them."""
        names = (END_OF_TURN, "<|endoftext|>")
        tokens = {self.tokenizer.convert_tokens_to_ids(name) for name in names} | {self.tokenizer.eos_token_id}
        return tuple(sorted(tokens - {None, self.tokenizer.unk_token_id}))
