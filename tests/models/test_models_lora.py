"""LoRA on the MMDiT: a collection of its own, exactly the published targets, mergeable."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.models.lora import count_matrices, count_parameters, merge_lora
from unipic2_jax.models.sd3.lora import LORA_TARGETS, init_lora
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.models.sd3.mmdit_names import rules
from unipic2_jax.weights import table

SMALL = MMDiTConfig(
    sample_size=8,
    in_channels=4,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=6,
    out_channels=4,
    pos_embed_max_size=4,
    dual_attention_layers=(0, 1),
)
RANK = 3
MODULE = MMDiT(SMALL, remat="none")
# Compiling is most of what these tests cost, and needs no optimisation at this size.
QUICK = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def inputs(config=SMALL):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {
        "latents": normal(2, 4, 4, config.in_channels),
        "timestep": np.array([900.0, 120.0], np.float32),
        "context": normal(2, 3, config.joint_attention_dim),
        "pooled": normal(2, config.pooled_projection_dim),
        "references": normal(2, 1, 4, 4, config.in_channels),
    }


def abstract_params(config):
    return jax.eval_shape(lambda: MMDiT(config).init(jax.random.key(0), **inputs(config)))["params"]


def randomise(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), tree)


def new_lora(params):
    return jax.device_get(QUICK(lambda params: init_lora(jax.random.key(1), params, RANK))(params))


@QUICK
def velocity(variables):
    return MODULE.apply(variables, **inputs())


@pytest.fixture(scope="module")
def params():
    return randomise(abstract_params(SMALL), 0)


def test_a_new_update_changes_nothing_and_is_drawn_as_published(params):
    lora = new_lora(params)
    np.testing.assert_array_equal(velocity({"params": params, "lora": lora}), velocity({"params": params}))
    shapes = abstract_params(dataclasses.replace(SMALL, num_layers=12))
    wide = jax.device_get(QUICK(lambda key: init_lora(key, shapes, 32))(jax.random.key(1)))
    for path, leaf in table.flatten(wide).items():
        if path.endswith("/b"):
            assert not leaf.any()
        else:
            assert abs(float(leaf.std()) * 32 - 1) < 0.1, path
            assert leaf.ndim == 2 or np.abs(leaf[0] - leaf[1]).max() > 0, "stacked layers must not share their draw"
    first, second = wide["blocks"]["attn"]["to_q"]["a"], wide["blocks"]["attn"]["to_k"]["a"]
    assert np.abs(first - second).max() > 0, "matrices must not share their draw"


def test_merged_equals_applied(params):
    lora = randomise(new_lora(params), 1)
    before = jax.tree.map(np.copy, params)
    applied, merged = velocity({"params": params, "lora": lora}), velocity({"params": merge_lora(params, lora)})
    applied, merged = np.asarray(applied), np.asarray(merged)
    assert np.linalg.norm(applied - merged) / np.linalg.norm(merged) < 1e-5
    plain = np.asarray(velocity({"params": params}))
    assert np.linalg.norm(applied - plain) / np.linalg.norm(plain) > 1e-2
    jax.tree.map(np.testing.assert_array_equal, params, before)
    halved = merge_lora(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), lora)
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype(jnp.bfloat16)}


def test_only_the_targets_are_merged(params):
    lora = randomise(new_lora(params), 1)
    old, new = table.flatten(params), table.flatten(jax.device_get(merge_lora(params, lora)))
    assert old.keys() == new.keys()
    changed = {path for path in old if np.any(old[path] != new[path])}
    adapted = {path.removesuffix("/a") + "/kernel" for path in table.flatten(lora) if path.endswith("/a")}
    assert changed == adapted
    assert {path.split("/")[1] for path in changed} == {"attn"}


def test_gradients_reach_every_matrix_that_matters(params):
    """Taken with respect to `lora` alone; of the last block's text queries nothing depends on."""
    lora = randomise(new_lora(params), 1)

    def loss(lora):
        return jnp.sum(MODULE.apply({"params": params, "lora": lora}, **inputs()) ** 2)

    gradient = jax.device_get(QUICK(jax.grad(loss))(lora))
    assert jax.tree.structure(gradient) == jax.tree.structure(lora)
    for path, leaf in table.flatten(gradient).items():
        layers = leaf if leaf.ndim == 3 else leaf[None]
        used = not path.startswith("last_block/attn/add_q_proj")
        assert [bool(np.any(layer)) for layer in layers] == [used] * len(layers), path


def test_full_size_has_191_matrices_and_18_8_million_parameters():
    config = MMDiTConfig()
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), abstract_params(config), 32))
    assert count_matrices(lora) == 191
    assert count_parameters(lora) == 191 * 32 * (1536 + 1536) == 18_776_064

    # Through the name table: the torch matrices are those that the paper's lineage names, in every block.
    adapted = {path.removesuffix("/a") for path in table.flatten(lora) if path.endswith("/a")}
    found = {
        name
        for rule in rules(config)
        if rule.path.endswith("/kernel") and rule.path.removesuffix("/kernel") in adapted
        for name, _ in rule.names()
    }
    torch_names = {name if name != "attn.to_out" else "attn.to_out.0" for name in LORA_TARGETS}
    wanted = {f"transformer_blocks.{i}.{name}.weight" for i in range(24) for name in torch_names}
    assert found == wanted - {"transformer_blocks.23.attn.to_add_out.weight"}
    assert len(found) == 191


def test_mismatches_are_named(params):
    lora = new_lora(params)
    with pytest.raises(ValueError, match="rank 0"):
        init_lora(jax.random.key(1), params, 0)
    with pytest.raises(ValueError, match=r"params\['transformer'\]"):
        init_lora(jax.random.key(1), {"transformer": params}, RANK)
    wrong = jax.tree.map(lambda x: x, lora)
    wrong["blocks"]["attn"]["to_q"]["a"] = jnp.zeros((1, 5, RANK))
    with pytest.raises(ValueError, match=r"blocks/attn/to_q of shapes .* another size"):
        merge_lora(params, wrong)
    foreign = {**lora, "last_block": {"attn": {"to_add_out": lora["last_block"]["attn"]["to_q"]}}}
    with pytest.raises(ValueError, match="last_block/attn/to_add_out, which this model does not have"):
        merge_lora(params, foreign)
