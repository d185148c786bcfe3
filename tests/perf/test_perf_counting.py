"""FLOPs counted from programs, against FLOPs counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from unipic2_jax.models.registry import SIZES
from unipic2_jax.models.sd3.flops import forward_flops
from unipic2_jax.models.sd3.mmdit import MMDiT
from unipic2_jax.models.splash import splash
from unipic2_jax.perf.counting import count_flops

X, W = jnp.ones((4, 8)), jnp.ones((8, 16))


def test_products_loops_choices_and_convolutions():
    assert count_flops(jax.jit(lambda x, w: x @ w), X, W) == 2 * 4 * 8 * 16
    loop = jax.jit(lambda x, w: jax.lax.scan(lambda c, _: (c @ w @ w.T, None), x, None, length=5)[0])
    assert count_flops(loop, X, W) == 5 * 2 * 2 * 4 * 8 * 16
    choice = jax.jit(lambda x, w: jax.lax.cond(x.sum() > 0, lambda: (x @ w) @ w.T, lambda: x))
    assert count_flops(choice, X, W) == 2 * 2 * 4 * 8 * 16
    image, kernel = jnp.ones((1, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
    convolve = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    assert count_flops(convolve, image, kernel) == 2 * 6 * 6 * 5 * 3 * 3 * 3


def test_gradients_cost_twice_and_recomputation_once_more():
    layer = lambda w, x: jnp.tanh(x @ w @ w.T)
    plain = jax.jit(jax.grad(lambda w, x: layer(w, x).sum()))
    again = jax.jit(jax.grad(lambda w, x: jax.checkpoint(layer)(w, x).sum()))
    forward = count_flops(jax.jit(layer), W, X)
    # Of the first product's two gradients one is of x, which nobody asks for.
    assert count_flops(plain, W, X) == pytest.approx(2.5 * forward)
    assert count_flops(again, W, X) == pytest.approx(3.5 * forward, rel=0.15)


def test_what_every_device_computes_and_kernels_of_blocks():
    mesh = AbstractMesh((4,), ("x",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    assert count_flops(jax.jit(split), X, W) == 2 * 4 * 8 * 16
    query, key = (jax.ShapeDtypeStruct((2, length, 3, 64), jnp.bfloat16) for length in (1024, 2048))
    attend = lambda query, key, value: splash(query, key, value, None, 1.0)
    products = 2 * 2 * 2 * 3 * 1024 * 2048 * 64
    assert count_flops(jax.jit(attend), query, key, key) == products
    # The logits once more, and the gradients of two products.
    gradients = jax.grad(lambda *given: attend(*given).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert count_flops(jax.jit(gradients), query, key, key) == pytest.approx(3.5 * products, rel=1e-3)


@pytest.mark.parametrize("size, text", [("tiny", 22), ("sd35_medium", 333)])
def test_the_transformer_costs_what_its_sizes_say(size, text):
    config = SIZES[size].networks["transformer"]
    edge = 6 if size == "tiny" else 64
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    latents = struct(2, edge, edge, config.in_channels)
    given = (latents, struct(2), struct(2, text, config.joint_attention_dim), struct(2, config.pooled_projection_dim))
    references = struct(2, 1, edge, edge, config.in_channels)
    model = MMDiT(config)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), *(jnp.zeros(x.shape) for x in given)))
    counted = count_flops(jax.jit(model.apply), params, *given, references)
    tokens = (edge // config.patch_size) ** 2
    # The text's queries of the last block, which nobody uses, are in the program until it is compiled.
    unused = 2 * 2 * text * config.width**2
    assert counted - unused == pytest.approx(2 * forward_flops(config, tokens, text, tokens), rel=1e-6)
