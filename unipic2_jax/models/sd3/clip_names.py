"""The table of CLIP's text encoder (`transformers.CLIPTextModelWithProjection`)."""

from __future__ import annotations

from unipic2_jax.models.sd3.clip import CLIPTextConfig
from unipic2_jax.weights.table import Rule


def rules(config: CLIPTextConfig) -> tuple[Rule, ...]:
    """Every tensor of the encoder; layers are stacked."""
    return (
        Rule("text_model.embeddings.token_embedding.weight", "token_embedding/embedding"),
        Rule("text_model.embeddings.position_embedding.weight", "position_embedding/embedding"),
        # Files written before transformers 4.31 carry this constant buffer.
        Rule("text_model.embeddings.position_ids", ""),
        Rule("text_model.final_layer_norm.weight", "final_layer_norm/scale"),
        Rule("text_model.final_layer_norm.bias", "final_layer_norm/bias"),
        Rule("text_projection.weight", "text_projection/kernel", "linear"),
        *encoder_layers("text_model.encoder.layers.{i}", range(config.num_hidden_layers)),
    )


def encoder_layers(torch: str, layers: range) -> tuple[Rule, ...]:
    """The pre-norm encoder layers that CLIP and MetaQuery's connector share, under 'layers'."""
    out = []
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    ):
        path = f"layers/{name.replace('.', '/')}"
        out.append(Rule(f"{torch}.{name}.weight", f"{path}/kernel", "linear", layers))
        out.append(Rule(f"{torch}.{name}.bias", f"{path}/bias", "copy", layers))
    for name in ("layer_norm1", "layer_norm2"):
        out.append(Rule(f"{torch}.{name}.weight", f"layers/{name}/scale", "copy", layers))
        out.append(Rule(f"{torch}.{name}.bias", f"layers/{name}/bias", "copy", layers))
    return tuple(out)
