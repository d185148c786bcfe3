"""The name table of the MMDiT: diffusers' `SD3Transformer2DModel` <-> `unipic2_jax.models.sd3.mmdit.MMDiT`."""

from __future__ import annotations

from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.weights.table import Rule

# Inside a block: torch name -> our name, where they differ.
RENAMED = {
    "attn.to_out": "attn.to_out.0",
    "attn2.to_out": "attn2.to_out.0",
    "ff.linear_1": "ff.net.0.proj",
    "ff.linear_2": "ff.net.2",
    "ff_context.linear_1": "ff_context.net.0.proj",
    "ff_context.linear_2": "ff_context.net.2",
}


def _linear(torch: str, path: str, layers: range | None = None) -> tuple[Rule, Rule]:
    return (
        Rule(f"{torch}.weight", f"{path}/kernel", "linear", layers),
        Rule(f"{torch}.bias", f"{path}/bias", "copy", layers),
    )


def block_linears(dual: bool, last: bool) -> tuple[str, ...]:
    """The dotted names of the linear layers inside one block."""
    names = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj")]
    names += ["norm1.linear", "norm1_context.linear", "ff.linear_1", "ff.linear_2"]
    if not last:
        names += ["attn.to_add_out", "ff_context.linear_1", "ff_context.linear_2"]
    if dual:
        names += [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out")]
    return tuple(names)


def block_norms(config: MMDiTConfig, dual: bool) -> tuple[str, ...]:
    """The dotted names of the query / key norms inside one block."""
    if config.qk_norm is None:
        return ()
    names = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
    return (*names, "attn2.norm_q", "attn2.norm_k") if dual else names


def rules(config: MMDiTConfig) -> tuple[Rule, ...]:
    """One rule per leaf of the parameter tree."""
    table = [
        Rule("pos_embed.pos_embed", "pos_embed/pos_embed"),
        Rule("pos_embed.proj.weight", "pos_embed/proj/kernel", "conv"),
        Rule("pos_embed.proj.bias", "pos_embed/proj/bias"),
        *_linear("context_embedder", "context_embedder"),
        *_linear("norm_out.linear", "norm_out/linear"),
        *_linear("proj_out", "proj_out"),
    ]
    for embedder in ("timestep_embedder", "text_embedder"):
        for linear in ("linear_1", "linear_2"):
            table += _linear(f"time_text_embed.{embedder}.{linear}", f"time_text_embed/{embedder}/{linear}")
    for group, layers in config.groups.items():
        last = group == "last_block"
        dual = layers.start < len(config.dual_attention_layers)
        # The last block stands alone: its leaves have no leading axis and its name a fixed number.
        prefix = f"transformer_blocks.{layers.start if last else '{i}'}"
        stacked = None if last else layers
        for name in block_linears(dual, last):
            table += _linear(f"{prefix}.{RENAMED.get(name, name)}", f"{group}/{name.replace('.', '/')}", stacked)
        for name in block_norms(config, dual):
            table.append(Rule(f"{prefix}.{name}.weight", f"{group}/{name.replace('.', '/')}/scale", layers=stacked))
    return tuple(table)
