"""MetaQuery's conditioner written with plain PyTorch modules, under the published names."""

from unipic2_jax.models.metaquery.connector import ConnectorConfig, MetaQueryConfig

SMALL = MetaQueryConfig(
    num_queries=5,
    llm_hidden_size=64,
    pooled_projection_dim=20,
    joint_attention_dim=28,
    connector_config=ConnectorConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, layer_norm_eps=1e-3
    ),
)


def reference(config, torch):
    """The conditioner's modules and arithmetic, from torch.nn alone."""
    nn, sizes = torch.nn, config.connector_config
    width, heads = sizes.hidden_size, sizes.num_attention_heads

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(width, width) for n in ("q", "k", "v", "out")})
            self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=sizes.layer_norm_eps) for _ in range(2))
            inner = sizes.intermediate_size
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

        def forward(self, x):
            y, attn = self.layer_norm1(x), self.self_attn
            query, key, value = (attn[f"{n}_proj"](y).unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
            mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + attn["out_proj"](mixed)
            hidden = nn.functional.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
            return x + self.mlp["fc2"](hidden)

    class Conditioner(nn.Module):
        def __init__(self):
            super().__init__()
            self.connector = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(sizes.num_hidden_layers))})
            self.projector_1 = nn.Linear(config.llm_hidden_size, width)
            self.projector_2 = nn.Linear(width, config.pooled_projection_dim)
            self.projector_3 = nn.Linear(width, config.joint_attention_dim)
            self.meta_queries = nn.Parameter(torch.zeros(config.num_queries, config.llm_hidden_size))

        def forward(self, x):
            x = self.projector_1(x)
            for layer in self.connector["layers"]:
                x = layer(x)
            return self.projector_3(x), self.projector_2(x.mean(1))

    torch.manual_seed(0)
    model = Conditioner()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.5)
    return model.eval()
