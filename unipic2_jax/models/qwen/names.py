"""The table of Qwen2.5-VL (`transformers.Qwen2_5_VLForConditionalGeneration`), as files on the hub name its tensors."""

from __future__ import annotations

import dataclasses

from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.weights.table import Rule

# Prefixes that transformers 5 uses in memory, and some files too.
NEWER = {"visual.": "model.visual.", "model.": "model.language_model."}


def rules(config: Qwen2_5_VLConfig) -> tuple[Rule, ...]:
    """Every tensor of the model; the blocks of the tower and the layers of the decoder are stacked."""
    out = [
        Rule("model.embed_tokens.weight", "embed_tokens/embedding"),
        Rule("model.norm.weight", "norm/scale"),
        # Tied: some files repeat the embedding under this name.
        Rule("lm_head.weight", "")
        if config.tie_word_embeddings
        else Rule("lm_head.weight", "lm_head/kernel", "linear"),
        Rule("visual.patch_embed.proj.weight", "visual/patch_embed/kernel", "conv3d"),
        Rule("visual.merger.ln_q.weight", "visual/merger_norm/scale"),
    ]
    for torch, path in {"visual.merger.mlp.0": "visual/merger_fc1", "visual.merger.mlp.2": "visual/merger_fc2"}.items():
        out += [Rule(f"{torch}.weight", f"{path}/kernel", "linear"), Rule(f"{torch}.bias", f"{path}/bias")]

    def stacked(
        torch: str, path: str, layers: range, norms: tuple[str, ...], linears: dict[str, str], biased: set
    ) -> None:
        out.extend(Rule(f"{torch}.{n}.weight", f"{path}/{n}/scale", "copy", layers) for n in norms)
        for theirs, ours in linears.items():
            out.append(Rule(f"{torch}.{theirs}.weight", f"{path}/{ours}/kernel", "linear", layers))
            if ours in biased:
                out.append(Rule(f"{torch}.{theirs}.bias", f"{path}/{ours}/bias", "copy", layers))

    mlp = {f"mlp.{n}_proj": f"mlp/{n}_proj" for n in ("gate", "up", "down")}
    attention = {f"self_attn.{n}_proj": f"self_attn/{n}_proj" for n in "qkvo"}
    tower = {"attn.qkv": "qkv", "attn.proj": "proj", **mlp}
    norms = ("input_layernorm", "post_attention_layernorm")
    biased = {f"self_attn/{n}_proj" for n in "qkv"}
    stacked("model.layers.{i}", "layers", range(config.num_hidden_layers), norms, attention | mlp, biased)
    blocks = range(config.vision_config.depth)
    stacked("visual.blocks.{i}", "visual/blocks", blocks, ("norm1", "norm2"), tower, set(tower.values()))
    return tuple(dataclasses.replace(rule, aliases=_newer(rule.torch)) for rule in out)


def _newer(name: str) -> tuple[str, ...]:
    return tuple(new + name.removeprefix(old) for old, new in NEWER.items() if name.startswith(old))
