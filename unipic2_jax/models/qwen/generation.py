"""Writing text with Qwen2.5-VL: prefill, then one token after the other in one compiled loop over a cache of fixed length.

Greedy decoding gives the tokens of transformers' `generate`; the order of what changes the logits is its order too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipic2_jax.flow.seeds import folded
from unipic2_jax.models.qwen.decoder import Cache, Qwen2_5_VL, init_cache
from unipic2_jax.models.qwen.vision import VisionInput


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, under transformers' names.

    Attributes:
      temperature: of the logits; 0 takes the likeliest token.
      top_p: sample from the likeliest tokens that together have this probability; 1 samples from all.
      repetition_penalty: divides the positive logits of tokens that the prompt or the answer already has, and multiplies
        the negative ones; 1 leaves them.

    Raises:
      ValueError: when a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0.")


GREEDY = SamplingConfig()


class WritingState(NamedTuple):
    """An answer in progress.

    Attributes:
      tokens: int32 [B, T], the prompts, then what has been written.
      valid: bool [B, T], padding left out.
      place: int32 scalar, the one that is written next.
      position: int32 [B], its rotary position.
      finished: bool [B], which rows have ended.
      seen: bool [B, V], tokens that a row already has.
      logits: float32 [B, V], of the next token.
      cache: keys and values of the places before `place`.
      key: random key.
    """

    tokens: jax.Array
    valid: jax.Array
    place: jax.Array
    position: jax.Array
    finished: jax.Array
    seen: jax.Array
    logits: jax.Array
    cache: Cache
    key: jax.Array


def choose(logits: jax.Array, seen: jax.Array, key: jax.Array, config: SamplingConfig) -> jax.Array:
    """The next token of every row: float32 logits [B, V] and `seen` [B, V] to int32 [B]."""
    if config.repetition_penalty != 1:
        penalised = jnp.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token stays while those before it do not reach top_p yet: the first one always does.
        stays = jnp.cumsum(probability, axis=-1) - probability < config.top_p
        least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("module", "room", "cache_dtype"))
def prefill(
    module: Qwen2_5_VL,
    params: Any,
    input_ids: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    vision: VisionInput | None,
    key: jax.Array,
    *,
    room: int,
    cache_dtype: Any = jnp.float32,
) -> WritingState:
    """Reads the prompts, padded on the left, and makes room for an answer of `room` tokens.

    Args:
      input_ids, positions, valid, vision: as `Qwen2_5_VL` takes them.
    """
    batch, length = input_ids.shape
    apply = functools.partial(module.apply, params)
    spread = lambda x, value: jnp.pad(x, ((0, 0), (0, room)), constant_values=value)
    tokens, valid = spread(jnp.asarray(input_ids, jnp.int32), 0), spread(jnp.asarray(valid, bool), True)
    embeddings = apply(input_ids, vision, method="embed")
    cache = init_cache(module.config, batch, length + room, cache_dtype)
    hidden, cache = apply(embeddings, positions, valid, cache, 0, method="decode")
    # Padding counts as seen, as it does in transformers.
    seen = jnp.zeros((batch, module.config.vocab_size), bool).at[jnp.arange(batch)[:, None], input_ids].set(True)
    position = jnp.max(positions, axis=(0, 2)).astype(jnp.int32) + 1
    logits = apply(hidden[:, -1], method="logits")
    return WritingState(tokens, valid, jnp.int32(length), position, jnp.zeros(batch, bool), seen, logits, cache, key)


@functools.partial(jax.jit, static_argnames=("module", "config", "stop_tokens", "pad_token"), donate_argnames="state")
def write(
    module: Qwen2_5_VL,
    params: Any,
    state: WritingState,
    until: jax.Array,
    *,
    config: SamplingConfig,
    stop_tokens: tuple[int, ...],
    pad_token: int,
) -> WritingState:
    """Writes until place `until`, the end of the room, or the end of every row, whichever comes first.

    A row ends with the first of its `stop_tokens`, which is kept; `pad_token` follows.
    """
    apply = functools.partial(module.apply, params)
    until = jnp.minimum(until, state.tokens.shape[1])

    def goes_on(state: WritingState) -> jax.Array:
        return (state.place < until) & ~state.finished.all()

    def step(state: WritingState) -> WritingState:
        key, here = jax.random.split(state.key)
        token = jnp.where(state.finished, pad_token, choose(state.logits, state.seen, here, config))
        finished = state.finished | jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))
        tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.place, axis=1)
        seen = state.seen.at[jnp.arange(len(token)), token].set(True)
        positions = jnp.broadcast_to(state.position[None, :, None], (3, len(token), 1))
        embeddings = apply(token[:, None], method="embed")
        hidden, cache = apply(embeddings, positions, state.valid, state.cache, state.place, method="decode")
        logits = apply(hidden[:, -1], method="logits")
        return state._replace(
            tokens=tokens,
            place=state.place + 1,
            position=state.position + 1,
            finished=finished,
            seen=seen,
            logits=logits,
            cache=cache,
            key=key,
        )

    return jax.lax.while_loop(goes_on, step, state)


def generate(
    module: Qwen2_5_VL,
    params: Any,
    input_ids: np.ndarray,
    positions: np.ndarray,
    valid: np.ndarray,
    vision: VisionInput | None = None,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
    config: SamplingConfig = GREEDY,
    seed: int = 0,
    cache_dtype: Any = jnp.float32,
    on_tokens: Callable[[np.ndarray], None] | None = None,
    stream_every: int = 4,
) -> np.ndarray:
    """Answers a batch of prompts: int32 [B, N], N <= max_new_tokens, rows that ended early filled with `pad_token`.

    Args:
      input_ids, valid: int and bool [B, S], padded on the left. positions: int [3, B, S].
      on_tokens: called with the new tokens [B, n] every `stream_every` tokens.

    Raises:
      ValueError: when prompt and answer are longer than the model's positions, or there is nothing to write.
    """
    length, limit = input_ids.shape[1], module.config.max_position_embeddings
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if length + max_new_tokens > limit:
        raise ValueError(
            f"A prompt of {length} tokens and {max_new_tokens} new ones exceed the model's {limit} positions; shorten "
            "the prompt or the answer."
        )
    state = prefill(
        module,
        params,
        input_ids,
        positions,
        valid,
        vision,
        jax.random.key(folded(seed)),
        room=max_new_tokens,
        cache_dtype=cache_dtype,
    )
    end, done = length + max_new_tokens, length
    advance = functools.partial(write, module, params, config=config, stop_tokens=stop_tokens, pad_token=pad_token)
    while done < end:
        state = advance(state, jnp.int32(end if on_tokens is None else min(done + stream_every, end)))
        before, done = done, int(state.place)
        if on_tokens is not None and done > before:
            on_tokens(np.asarray(state.tokens[:, before:done]))
        if bool(state.finished.all()):
            break
    return np.asarray(state.tokens[:, length:done])
