"""The kernels behind `attention` agree, and which is taken is said."""

import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from unipic2_jax.models import attention as module
from unipic2_jax.models.attention import attention, check_implementation
from unipic2_jax.models.splash import splash
from unipic2_jax.parallel.mesh import AXES, make_mesh

SCALE = 0.125


def arrays(queries, keys, dtype=jnp.float32, batch=2, heads=2, width=64):
    draw = np.random.default_rng(queries + keys).standard_normal
    query, key, value = (jnp.asarray(draw((batch, n, heads, width)), dtype) for n in (queries, keys, keys))
    seen = jnp.arange(keys) < jnp.asarray([[keys], [keys - 7]])
    return query, key, value, seen


@pytest.mark.parametrize("queries, keys", [(37, 150), (130, 600)])
def test_splash_equals_xla_with_its_gradients(queries, keys):
    query, key, value, seen = arrays(queries, keys)
    ours = lambda *qkv: splash(*qkv, seen, SCALE, interpret=True)
    wanted = lambda *qkv: attention(*qkv, mask=seen[:, None, None], scale=SCALE, implementation="xla")
    loss = lambda fn: lambda *qkv: jnp.sum(jnp.sin(fn(*qkv)))
    np.testing.assert_allclose(ours(query, key, value), wanted(query, key, value), rtol=1e-4, atol=1e-5)
    found, expected = (jax.grad(loss(fn), argnums=(0, 1, 2))(query, key, value) for fn in (ours, wanted))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_auto_takes_what_the_platform_has_and_logs_it_once(caplog):
    query, key, value, _ = arrays(4, 6)
    module._say.cache_clear()
    with caplog.at_level(logging.INFO, module.__name__):
        attention(query, key, value)
        attention(query, key, value)
    assert [record.getMessage() for record in caplog.records] == ["attention on cpu: xla"]


@pytest.mark.parametrize(
    "platform, dtype, keys, options, chosen",
    [
        ("gpu", jnp.bfloat16, 8, {}, "cudnn"),
        ("gpu", jnp.float32, 8, {}, "xla"),
        ("gpu", jnp.bfloat16, 7, {"mask": (2, 1, 1, 7)}, "cudnn"),
        ("tpu", jnp.bfloat16, 8, {}, "xla"),
        ("tpu", jnp.bfloat16, 2048, {}, "splash"),
        ("tpu", jnp.float32, 2048, {"mask": (2, 1, 1, 2048)}, "splash"),
        ("tpu", jnp.float32, 2048, {"mask": (2, 1, 4, 2048)}, "xla"),
        ("tpu", jnp.float32, 2048, {"bias": (1, 2, 4, 2048)}, "xla"),
        ("cpu", jnp.bfloat16, 2048, {}, "xla"),
    ],
)
def test_which_kernel_where(platform, dtype, keys, options, chosen):
    query, key, _, _ = arrays(4, keys, dtype)
    mask, bias = (jnp.ones(options[name]) if name in options else None for name in ("mask", "bias"))
    with mock.patch.object(module, "platform", return_value=platform):
        assert module._best(query, key, mask, bias)[0] == chosen


def test_cudnn_takes_whole_samples_and_narrow_heads():
    best = lambda *arrays: module._best(*arrays, None, None)[0]
    narrow, wide = (arrays(4, 8, jnp.bfloat16, width=width)[:2] for width in (64, 512))
    sizes, types = {"data": 1, "fsdp": 2, "tensor": 1}, (AxisType.Auto,) * 4
    with mock.patch.object(module, "platform", return_value="gpu"):
        for sequence, chosen in {1: "cudnn", 2: "xla"}.items():
            shape = (*sizes.values(), sequence)
            with jax.sharding.use_abstract_mesh(AbstractMesh(shape, AXES, axis_types=types)):
                assert best(*narrow) == chosen
        assert best(*wide) == "xla"


@pytest.mark.parametrize("queries, keys", [(5, 7), (4, 7), (5, 8)])
@pytest.mark.parametrize("given", ["nothing", "mask", "bias", "both"])
def test_odd_lengths_under_cudnn(queries, keys, given):
    """The kernel is given what JAX lets it have in training (`check_layout`, `check_is_flash_attention`), and gives the same."""
    query, key, value, seen = arrays(queries, keys, jnp.bfloat16)
    bias = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, queries, keys)), jnp.bfloat16)
    seen = seen.at[:, 0].set(True)[:, None, None]
    options = {"mask": {"mask": seen}, "bias": {"bias": bias}, "both": {"mask": seen, "bias": bias}}.get(given, {})
    wanted = attention(query, key, value, **options, implementation="xla")

    def kernel(query, key, value, bias=None, mask=None, *, scale, implementation, **counts):
        lengths = (query.shape[1], key.shape[1])
        assert all(length % 2 == 0 for length in lengths)
        assert all(x is None or x.shape[2:] == lengths for x in (mask, bias))
        if counts:  # the plain flash kernel: it is told how many tokens there are
            assert given in ("mask", "nothing") and mask is None and bias is None
            assert (np.asarray(counts["query_seq_lengths"]) == queries).all()
            mask = (jnp.arange(lengths[1]) < counts["key_value_seq_lengths"][:, None])[:, None, None]
        return attention(query, key, value, mask=mask, bias=bias, scale=scale, implementation="xla")

    with mock.patch.object(jax.nn, "dot_product_attention", kernel):
        found = module._cudnn(query, key, value, options.get("mask"), options.get("bias"), SCALE)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, wanted)), rtol=1e-2, atol=1e-2)


def test_keys_that_are_padding_are_seen_by_none():
    """By every kernel; cuDNN is told how many there are, and copies nothing."""
    query, key, value, _ = arrays(4, 8, jnp.bfloat16)
    wanted = attention(query, key[:, :5], value[:, :5], implementation="xla")
    found = attention(query, key, value, keys=5, implementation="xla")
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))

    def kernel(*given, scale, implementation, query_seq_lengths, key_value_seq_lengths):
        assert all(a is b for a, b in zip(given, (query, key, value)))
        assert (query_seq_lengths == 4).all() and (key_value_seq_lengths == 5).all()
        return wanted

    with mock.patch.object(jax.nn, "dot_product_attention", kernel):
        assert module._cudnn(query, key, value, None, None, SCALE, 5) is not None
    with mock.patch.object(module, "platform", return_value="gpu"):
        filled = [module.filler(tokens, jnp.bfloat16) for tokens in (1357, 1358)]
        assert filled == [1, 0] and module.filler(1357, jnp.float32) == 0
    assert module.filler(1357, jnp.bfloat16) == 0  # a CPU


def test_a_kernel_by_name_is_that_or_an_error():
    query, key, value, _ = arrays(4, 6)
    for name, sentence in {"cudnn": "this is a cpu", "splash": "this is a cpu", "flash": "there is auto, xla"}.items():
        with pytest.raises(ValueError, match=f"'{name}' cannot be had here: {sentence}"):
            attention(query, key, value, implementation=name)
    with pytest.raises(ValueError, match="attention is 'flash'; use one of auto, xla, cudnn, splash"):
        check_implementation("flash")
    with pytest.raises(ValueError, match="attention is 'splash', which a cpu has not"):
        check_implementation("splash")
    check_implementation("auto")
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        check_implementation("xla")
