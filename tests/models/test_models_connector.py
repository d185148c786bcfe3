"""MetaQuery's connector against plain PyTorch modules under the published names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.models.connector import ConnectorConfig, MetaQuery, MetaQueryConfig
from unipic2_jax.weights import connector as weights
from unipic2_jax.weights.registry import NETWORKS
from unipic2_jax.weights.table import expected_shapes, to_flax, to_torch

NETWORK = NETWORKS["StableDiffusion3Conditioner"]
SMALL = MetaQueryConfig(
    num_queries=5,
    llm_hidden_size=24,
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


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def test_context_and_pooled_equal_pytorch():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    model = reference(SMALL, torch)
    source = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    params = {"params": to_flax(weights.rules(SMALL), source, NETWORK.abstract(SMALL))}
    hidden = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(hidden))
    got = jax.jit(MetaQuery(SMALL).apply)(params, hidden)
    assert [g.shape for g in got] == [(2, 5, 28), (2, 20)]
    assert all(relative_error(g, w) <= 1e-4 for g, w in zip(got, want))
    queries = MetaQuery(SMALL).apply(params, 2, method="queries")
    np.testing.assert_array_equal(queries[1], source["meta_queries"])
    back = dict(to_torch(weights.rules(SMALL), params["params"]))
    assert back.keys() == source.keys() and all(np.array_equal(back[k], source[k]) for k in source)


def test_every_tensor_at_full_size():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    config = MetaQueryConfig()
    with torch.device("meta"):
        model = reference(config, torch)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert expected_shapes(weights.rules(config), NETWORK.abstract(config)) == shapes


def test_a_new_conditioner_starts_from_no_condition():
    params = jax.jit(MetaQuery(SMALL).init)(jax.random.key(0), jnp.zeros((1, 5, 24)))
    context, pooled = MetaQuery(SMALL).apply(params, jnp.ones((1, 5, 24)))
    assert not context.any() and not pooled.any()
    queries = params["params"]["meta_queries"]
    assert abs(float(queries.std()) * 24**0.5 - 1) < 0.3


def test_the_published_config_is_read_and_written():
    published = {
        "_class_name": "StableDiffusion3Conditioner",
        "connector_config": {
            "_attn_implementation": "flash_attention_2",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 24,
            "num_hidden_layers": 24,
        },
        "joint_attention_dim": 4096,
        "llm_hidden_size": 3584,
        "num_queries": 256,
        "pooled_projection_dim": 2048,
    }
    assert MetaQueryConfig.from_dict(published) == MetaQueryConfig()
    assert MetaQueryConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(ValueError, match="does not split into 5 heads"):
        MetaQueryConfig.from_dict({"connector_config": {"num_attention_heads": 5}})
