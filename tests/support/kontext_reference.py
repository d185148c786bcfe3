"""A PyTorch Kontext transformer for the tests, assembled from the blocks of diffusers' own SD3Transformer2DModel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel


def kontext_forward(
    model: SD3Transformer2DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    references: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Velocity [B, C, H, W] of latents [B, C, H, W], given clean reference latents, each [B, C, Hr, Wr] of any size.

    Every image goes through the model's own patch embedding (which crops the position table by that image's grid);
    the image stream is [reference tokens..., target tokens]; after the last block only the target tokens are kept.
    """
    batch, _, height, width = latents.shape
    patch = model.config.patch_size
    target = model.pos_embed(latents)
    x = torch.cat([*(model.pos_embed(reference) for reference in references), target], dim=1)
    emb = model.time_text_embed(timestep, pooled)
    text = model.context_embedder(context)
    for block in model.transformer_blocks:
        text, x = block(hidden_states=x, encoder_hidden_states=text, temb=emb)
    x = model.proj_out(model.norm_out(x[:, -target.shape[1] :], emb))
    x = x.reshape(batch, height // patch, width // patch, patch, patch, model.out_channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, model.out_channels, height, width)
