"""MetaQuery's connector against plain PyTorch modules under the published names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from connector_reference import SMALL, reference

from unipic2_jax.models.metaquery import names as weights
from unipic2_jax.models.metaquery.connector import MetaQuery, MetaQueryConfig
from unipic2_jax.models.registry import NETWORKS
from unipic2_jax.weights.table import expected_shapes, to_flax, to_torch

NETWORK = NETWORKS["StableDiffusion3Conditioner"]


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def test_context_and_pooled_equal_pytorch():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    model = reference(SMALL, torch)
    source = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    params = {"params": to_flax(weights.rules(SMALL), source, NETWORK.abstract(SMALL))}
    hidden = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
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
    params = jax.jit(MetaQuery(SMALL).init)(jax.random.key(0), jnp.zeros((1, 5, 64)))
    context, pooled = MetaQuery(SMALL).apply(params, jnp.ones((1, 5, 64)))
    assert not context.any() and not pooled.any()
    other = MetaQuery(SMALL, zero_projectors=False)
    context, pooled = other.apply(jax.jit(other.init)(jax.random.key(0), jnp.zeros((1, 5, 64))), jnp.ones((1, 5, 64)))
    assert context.any() and pooled.any()
    queries = params["params"]["meta_queries"]
    assert abs(float(queries.std()) * 64**0.5 - 1) < 0.3


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
