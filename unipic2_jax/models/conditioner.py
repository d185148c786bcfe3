"""What turns prompts, and pictures where it reads any, into what conditions the transformer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from unipic2_jax.data.text import check_unicode


class Conditioner(Protocol):
    """Turns prompts, and for edits perhaps their images, into (context [B, S, J], pooled [B, P]).

    `tokenize` is host work; what it gives is a tree whose leaves lead with the batch. `apply` is pure and may be jitted;
    its `params` are the trees of `modules`, by the same names, which are the folders of a checkpoint.

    Attributes:
      reads_images: whether `tokenize` depends on the images, so that an unconditional branch needs them too.
      own_sizes: whether the pictures of a prompt may have several sizes, each that of its latents. Without it all are the target's.
      latent_references: whether references also go into the transformer's self-attention.
      joint_attention_dim, context_length, pooled_dim: J, S and P.
      modules: the networks, by folder.
      SETTINGS: fields that `unipic2.json` keeps.
    """

    reads_images: ClassVar[bool]
    own_sizes: ClassVar[bool]
    latent_references: bool
    SETTINGS: ClassVar[tuple[str, ...]]
    joint_attention_dim: int

    @property
    def context_length(self) -> int: ...

    @property
    def pooled_dim(self) -> int: ...

    @property
    def modules(self) -> dict[str, Any]: ...

    @property
    def description(self) -> str:
        """What it is, in a few words for people."""
        ...

    def default_negative(self, is_edit: bool) -> str:
        """What the unconditional branch is told where nobody says it."""
        ...

    def tokenize(self, prompts: Sequence[str] | str, images: Sequence[Sequence[Any]] | None = None) -> Any:
        """Tokens for the prompts; `images` holds the pictures that each of them edits."""
        ...

    def apply(self, params: dict[str, Any], tokens: Any) -> tuple[jax.Array, jax.Array]: ...

    def save_tokenizers(self, folder: str | Path) -> None:
        """Writes what `tokenize` needs into a model folder."""
        ...


def tokenize_negative(conditioner: Conditioner, negative: str | None, images: Sequence[Sequence[Any]] | None) -> Any:
    """Tokens of the unconditional branch: one row for all prompts, or one for each where images are read.

    Args:
      negative: None: the conditioner's own, which for edits may be another than for text-to-image.
      images: what is edited; None for text-to-image.
    """
    negative = conditioner.default_negative(images is not None) if negative is None else negative
    if images is None or not conditioner.reads_images:
        return conditioner.tokenize([negative])
    return conditioner.tokenize([negative] * len(images), images)


def conditioning_with_dropout(
    conditioner: Conditioner, params: dict[str, Any], batch: dict[str, Any], drop: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(context, pooled) of a training batch, some of whose captions are left out.

    Args:
      params: of the conditioner.
      batch: 'tokens' and 'empty_tokens', what `tokenize` gave for the captions and for empty ones (one for all, or one each), or
        'conditioning' and 'empty_conditioning', what `apply` made of them.
      drop: bool [B], which captions are left out.
    """
    kept = lambda given, empty: jnp.where(drop.reshape(-1, *[1] * (given.ndim - 1)), empty, given)
    if "conditioning" in batch:
        return jax.tree.map(kept, batch["conditioning"], batch["empty_conditioning"])
    return conditioner.apply(params, jax.tree.map(kept, batch["tokens"], batch["empty_tokens"]))


def check_prompts(prompts: Sequence[str] | str, name: str = "prompt") -> list[str]:
    """The prompts as a list.

    Args:
      name: of the argument, for messages.

    Raises:
      TypeError: when one is not a string, or there is no list.
      ValueError: when one holds half a character.
    """
    if not isinstance(prompts, str | Iterable):
        raise TypeError(f"{name} is {prompts!r}; it must be a string, or a list of some.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"A {name} must be a string but one is {type(prompt).__name__}; pass text.")
        check_unicode(prompt, name)
    return prompts
