"""The table of T5's encoder (`transformers.T5EncoderModel`)."""

from __future__ import annotations

from unipic2_jax.models.sd3.t5 import T5Config
from unipic2_jax.weights.table import Rule


def rules(config: T5Config) -> tuple[Rule, ...]:
    """Every tensor of the encoder; layers are stacked. The position bias of block 0 serves all blocks."""
    layers = range(config.num_layers)
    attention, mlp = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    return (
        Rule("shared.weight", "shared/embedding"),
        # Some files repeat the tied embedding under the encoder's name.
        Rule("encoder.embed_tokens.weight", ""),
        Rule(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_attention_bias/embedding"
        ),
        Rule("encoder.final_layer_norm.weight", "final_layer_norm/scale"),
        Rule(f"{attention}.layer_norm.weight", "layers/attention_norm/scale", "copy", layers),
        Rule(f"{mlp}.layer_norm.weight", "layers/mlp_norm/scale", "copy", layers),
        *(
            Rule(f"{attention}.SelfAttention.{n}.weight", f"layers/attention/{n}/kernel", "linear", layers)
            for n in ("q", "k", "v", "o")
        ),
        *(
            Rule(f"{mlp}.DenseReluDense.{n}.weight", f"layers/mlp/{n}/kernel", "linear", layers)
            for n in ("wi_0", "wi_1", "wo")
        ),
    )
