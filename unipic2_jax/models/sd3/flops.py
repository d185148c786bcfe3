"""Floating-point operations of the transformer, counted from its sizes (compilers count a scanned body once)."""

from __future__ import annotations

from unipic2_jax.models.sd3.mmdit import TIME_CHANNELS, MMDiTConfig


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
    total += 2 * d * 2 * d + 2 * target_tokens * d * patch * config.velocity_channels  # output
    return total
