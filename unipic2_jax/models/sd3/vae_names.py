"""The name table of the autoencoder: diffusers' `AutoencoderKL` <-> `unipic2_jax.models.sd3.vae.AutoencoderKL`."""

from __future__ import annotations

from unipic2_jax.models.sd3.vae import VAEConfig
from unipic2_jax.weights.table import Rule


def _layer(torch: str, path: str, transform: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{path}/kernel", transform), Rule(f"{torch}.bias", f"{path}/bias")


def _norm(torch: str, path: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{path}/scale"), Rule(f"{torch}.bias", f"{path}/bias")


def _resnet(torch: str, path: str, shortcut: bool = False) -> list[Rule]:
    convs = ("conv1", "conv2", "conv_shortcut") if shortcut else ("conv1", "conv2")
    rules = [rule for name in convs for rule in _layer(f"{torch}.{name}", f"{path}/{name}", "conv")]
    return rules + [rule for name in ("norm1", "norm2") for rule in _norm(f"{torch}.{name}", f"{path}/{name}")]


def _half(config: VAEConfig, half: str, side: str, sampler: str, layers: int, widths: tuple[int, ...]) -> list[Rule]:
    """The encoder's or decoder's rows, whose resolutions have these widths in the order of computation."""
    rules = [rule for name in ("conv_in", "conv_out") for rule in _layer(f"{half}.{name}", f"{half}/{name}", "conv")]
    rules += _norm(f"{half}.conv_norm_out", f"{half}/conv_norm_out")
    for j in range(2):
        rules += _resnet(f"{half}.mid_block.resnets.{j}", f"{half}/mid_block/resnets_{j}")
    if config.mid_block_add_attention:
        torch, path = f"{half}.mid_block.attentions.0", f"{half}/mid_block/attentions_0"
        rules += _norm(f"{torch}.group_norm", f"{path}/group_norm")
        for theirs, ours in {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}.items():
            rules += _layer(f"{torch}.{theirs}", f"{path}/{ours}", "linear")
    for i, (before, width) in enumerate(zip((widths[0], *widths), widths)):
        torch, path = f"{half}.{side}_blocks.{i}", f"{half}/{side}_blocks_{i}"
        for j in range(layers):
            rules += _resnet(f"{torch}.resnets.{j}", f"{path}/resnets_{j}", shortcut=j == 0 and before != width)
        if i < len(widths) - 1:
            rules += _layer(f"{torch}.{sampler}s.0.conv", f"{path}/{sampler}", "conv")
    return rules


def rules(config: VAEConfig) -> tuple[Rule, ...]:
    """One rule per leaf of the parameter tree."""
    widths, layers = config.block_out_channels, config.layers_per_block
    table = _half(config, "encoder", "down", "downsampler", layers, widths)
    table += _half(config, "decoder", "up", "upsampler", layers + 1, widths[::-1])
    if config.use_quant_conv:
        table += _layer("quant_conv", "quant_conv", "conv")
    if config.use_post_quant_conv:
        table += _layer("post_quant_conv", "post_quant_conv", "conv")
    return tuple(table)
