"""The loss of a vision-language model on the answers it should give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from unipic2_jax.models.qwen.decoder import Qwen2_5_VL


def answer_loss(
    vlm: Qwen2_5_VL, params: Any, batch: Any, is_answer: jax.Array, equal_answers: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of the answers' tokens, as transformers has it.

    Args:
      batch: `models.qwen.processor.VLMInput` of conversations with their answers, [B, T].
      is_answer: bool [B, T], the answers' tokens.
      equal_answers: every answer counts the same, however long: the mean over answers of the mean over their tokens.

    Returns:
      The scalar loss; the share of tokens that are the likeliest ones, and of answers in which all are.
    """
    positions = jnp.swapaxes(batch.positions, 0, 1)
    hidden = vlm.apply({"params": params}, batch.input_ids, positions, batch.valid, batch.vision)
    logits = vlm.apply({"params": params}, hidden[:, :-1], method="logits")
    target, counted = batch.input_ids[:, 1:], is_answer[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    hit = jnp.argmax(logits, axis=-1) == target
    total = counted.sum()
    weights = counted / (counted.sum(axis=-1, keepdims=True) * len(counted)) if equal_answers else counted / total
    metrics = {
        "token_accuracy": jnp.sum(hit & counted) / total,
        "answer_accuracy": jnp.mean(jnp.all(hit | ~counted, axis=-1)),
    }
    return jnp.sum(losses * weights), metrics
