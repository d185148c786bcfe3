"""Floating-point operations of the transformer, counted from its sizes (compilers count a scanned body once)."""

from __future__ import annotations

from unipic2_jax.models.mmdit import TIME_CHANNELS, MMDiTConfig


def forward_flops(config: MMDiTConfig, target_tokens: int, text_tokens: int, reference_tokens: int = 0) -> int:
    """One forward pass of one sample; a multiply-add counts as two. Norms, softmax and activations are left out."""
    d, patch = config.width, config.patch_size**2
    image, text = target_tokens + reference_tokens, text_tokens
    total = 2 * image * patch * config.in_channels * d  # patch embedding
    total += 2 * text * config.joint_attention_dim * d  # context embedding
    total += 2 * d * (TIME_CHANNELS + d + config.pooled_projection_dim + d)  # time and pooled text
    for layer in range(config.num_layers):
        dual, last = layer < len(config.dual_attention_layers), layer == config.num_layers - 1
        # The last block needs keys and values of everything, but an output of the target alone.
        kept = target_tokens if last else image
        total += 2 * d * d * (9 if dual else 6) + 2 * d * d * (2 if last else 6)  # modulations
        total += 2 * d * d * (2 * image + 2 * kept)  # keys, values; queries, output
        total += 2 * d * d * (2 if last else 4) * text
        total += 4 * d * (kept + (0 if last else text)) * (image + text)  # joint attention
        total += 16 * d * d * (kept + (0 if last else text))  # feed-forward
        if dual:
            total += 2 * d * d * (2 * image + 2 * kept) + 4 * d * kept * image
    total += 2 * d * 2 * d + 2 * target_tokens * d * patch * config.out_channels  # output
    return total


def flow_step_flops(forward: int, batch: int, trains_weights: bool) -> int:
    """One step of flow matching: the forward pass, gradients of activations, and of weights where they are trained.

    Args:
      forward: of one sample, from `forward_flops`.
      batch: samples.
      trains_weights: whether the transformer's own weights are trained; if not, gradients only go through it.
    """
    return forward * batch * (3 if trains_weights else 2)


def grpo_step_flops(
    forward: int, sampled: int, trained: int, reference: bool, old: int = 0, trains_weights: bool = False
) -> int:
    """One GRPO iteration: sampling, the policy's forward and backward pass, the forward passes of the reference and of the old policy.

    The backward pass of a LoRA policy is one more forward's worth: gradients go through the frozen matrices and not
    into them. Recomputed activations do not count, as usual for model FLOPs; neither do the VAE and text encoders.

    Args:
      forward: of one sample and branch, from `forward_flops`.
      sampled, trained: evaluations (samples x steps x branches of guidance) of the sampler and of the trainer.
      reference: whether a reference policy is evaluated.
      old: evaluations of the old policy by the trainer, whose log-probabilities the algorithm needs: those of all optimizer steps
        of a rollout but the first, or none where the sampler's are used.
      trains_weights: whether the transformer's own weights are trained instead of a LoRA: their gradients are one forward's worth more.
    """
    return forward * (sampled + trained * (2 + reference + trains_weights) + old)
