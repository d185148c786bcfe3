"""CLIP and T5 against transformers: values on shrunken configs, names and shapes at full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.models.sd3 import clip_names as clip_weights
from unipic2_jax.models.sd3 import t5_names as t5_weights
from unipic2_jax.models.sd3.clip import CLIP_BIGG, CLIP_L, CLIPTextConfig, CLIPTextModelWithProjection
from unipic2_jax.models.sd3.t5 import T5Config, T5Encoder, relative_position_buckets
from unipic2_jax.weights.table import expected_shapes, flatten, to_flax, to_torch

CLIP_SMALL = CLIPTextConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=64,
    projection_dim=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=20,
    eos_token_id=98,
)
T5_SMALL = T5Config(vocab_size=99, d_model=32, d_kv=12, d_ff=48, num_layers=3, num_heads=4)


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def replace(config, **fields):
    return type(config)(**{**config.to_dict(), **fields})


def abstract_params(module, length=4):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, length), jnp.int32))["params"]


def random_params(module):
    """Cheaper than compiling `init`: numpy normals of about the initial size."""
    rng = np.random.default_rng(0)
    draw = lambda x: (rng.standard_normal(x.shape) * (x.shape[-2] ** -0.5 if len(x.shape) > 1 else 1)).astype(x.dtype)
    return {"params": jax.tree.map(draw, abstract_params(module))}


def clip_ids(config, rng, rows=4, length=12):
    """Rows that end at different places; padding repeats the end token, and one row pads with 0."""
    ids = rng.integers(3, config.vocab_size - 1, (rows, length))
    for row, end in enumerate(rng.permutation(np.arange(3, length))[:rows]):
        ids[row, end:] = config.vocab_size - 1
    ids[0, np.argmax(ids[0] == config.vocab_size - 1) + 1 :] = 0
    return ids


def randomized(model, torch):
    """Weights of size one in every tensor: at their own initial scale, norms and biases would be ones and zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.5)
    return model.eval()


def clip_reference(config, torch):
    from transformers import CLIPTextConfig as HFConfig
    from transformers import CLIPTextModelWithProjection as HFModel

    return randomized(HFModel(HFConfig(**config.to_dict())), torch)


def t5_reference(config, torch):
    from transformers import T5Config as HFConfig
    from transformers import T5EncoderModel as HFModel

    return randomized(HFModel(HFConfig(**config.to_dict())), torch)


def loaded(module, rules, model):
    source = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    return to_flax(rules, source, abstract_params(module)), source


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 98], ids=["legacy_eos", "eos"])
def test_clip_equals_transformers(act, eos):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    config = replace(CLIP_SMALL, hidden_act=act, eos_token_id=eos)
    model, module = clip_reference(config, torch), CLIPTextModelWithProjection(config)
    params, _ = loaded(module, clip_weights.rules(config), model)
    ids = clip_ids(config, np.random.default_rng(0))
    with torch.no_grad():
        want = model(torch.from_numpy(ids), output_hidden_states=True)
    states, pooled = jax.jit(module.apply)({"params": params}, jnp.asarray(ids, jnp.int32))
    assert states.shape == (4, 12, 32) and pooled.shape == (4, 24)
    assert relative_error(states, want.hidden_states[-2]) <= 1e-4
    assert relative_error(pooled, want.text_embeds) <= 1e-4
    # The two states are far apart, so that a wrong choice of layer could not pass.
    assert relative_error(want.hidden_states[-1], want.hidden_states[-2]) > 0.1


def test_clip_pools_at_the_first_eos_or_in_legacy_configs_at_the_largest_id():
    config = replace(CLIP_SMALL, eos_token_id=50)
    module, legacy = (CLIPTextModelWithProjection(c) for c in (config, replace(config, eos_token_id=2)))
    ids = jnp.asarray([[3, 50, 7, 98, 50, 8]], jnp.int32)
    params = random_params(module)
    apply = {model: jax.jit(model.apply) for model in (module, legacy)}

    def pooled(model, row):
        return np.asarray(apply[model](params, row)[1])

    # The encoder is causal, so the pooled vector depends on the tokens up to its place and on nothing behind it.
    for model, place in ((module, 1), (legacy, 3)):
        behind = ids.at[0, place + 1 :].set(9)
        np.testing.assert_allclose(pooled(model, behind), pooled(model, ids), rtol=1e-5, atol=1e-6)
        before = ids.at[0, place - 1].set(11)
        assert relative_error(pooled(model, before), pooled(model, ids)) > 1e-2


def test_clip_rejects_a_sequence_beyond_its_positions():
    module = CLIPTextModelWithProjection(CLIP_SMALL)
    with pytest.raises(ValueError, match="21 tokens but has 20 positions"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 21), jnp.int32))


def test_unknown_activations_are_named():
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        replace(CLIP_SMALL, hidden_act="relu")
    with pytest.raises(ValueError, match="feed_forward_proj 'relu'"):
        replace(T5_SMALL, feed_forward_proj="relu")


@pytest.mark.parametrize("masked", [False, True])
def test_t5_equals_transformers(masked):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    model, module = t5_reference(T5_SMALL, torch), T5Encoder(T5_SMALL)
    params, _ = loaded(module, t5_weights.rules(T5_SMALL), model)
    rng = np.random.default_rng(0)
    # Longer than relative_attention_max_distance, so that the last bucket is used too.
    ids = rng.integers(0, T5_SMALL.vocab_size, (2, 150))
    mask = (np.arange(150)[None] < np.array([[150], [90]])).astype(np.int64) if masked else None
    with torch.no_grad():
        want = model(torch.from_numpy(ids), attention_mask=None if mask is None else torch.from_numpy(mask))[0]
    got = jax.jit(module.apply)({"params": params}, jnp.asarray(ids, jnp.int32), mask)
    keep = slice(None) if mask is None else mask.astype(bool)
    assert relative_error(got[keep], want.numpy()[keep]) <= 1e-4


def test_t5_buckets_equal_transformers_everywhere():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, distance in ((32, 128), (16, 64), (32, 20)):
        positions = torch.arange(520)
        want = T5Attention._relative_position_bucket(
            positions[None, :] - positions[:, None], True, num_buckets=buckets, max_distance=distance
        )
        np.testing.assert_array_equal(relative_position_buckets(520, buckets, distance), want.numpy())


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_weights_return_unchanged(kind):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    if kind == "clip":
        rules, module, model = (
            clip_weights.rules(CLIP_SMALL),
            CLIPTextModelWithProjection(CLIP_SMALL),
            clip_reference(CLIP_SMALL, torch),
        )
        ignored = {"text_model.embeddings.position_ids": np.arange(20)[None]}
    else:
        rules, module, model = t5_weights.rules(T5_SMALL), T5Encoder(T5_SMALL), t5_reference(T5_SMALL, torch)
        ignored = {"encoder.embed_tokens.weight": model.shared.weight.detach().numpy()}
    stored = {k: v.detach().numpy() for k, v in model.state_dict().items() if k not in ignored}
    for source in (stored, {**stored, **ignored}):
        back = dict(to_torch(rules, to_flax(rules, source, abstract_params(module))))
        assert back.keys() == stored.keys()
        for name, value in stored.items():
            np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize(
    "rules, module, count",
    [
        (clip_weights.rules, CLIPTextModelWithProjection(CLIP_L), 123_650_304),
        (clip_weights.rules, CLIPTextModelWithProjection(CLIP_BIGG), 694_659_840),
        (t5_weights.rules, T5Encoder(T5Config()), 4_762_310_656),
    ],
    ids=["clip_l", "clip_bigg", "t5_xxl"],
)
def test_full_size_names_and_shapes(rules, module, count):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    import transformers

    config = module.config
    abstract = abstract_params(module)
    assert sum(np.prod(x.shape, dtype=np.int64) for x in flatten(abstract).values()) == count
    with torch.device("meta"):
        if isinstance(config, T5Config):
            model = transformers.T5EncoderModel(transformers.T5Config(**config.to_dict()))
        else:
            model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config.to_dict()))
    want = {k: tuple(v.shape) for k, v in model.named_parameters()}
    assert expected_shapes(rules(config), abstract) == want


def test_modules_compute_in_bfloat16():
    ids = jnp.arange(6)[None]
    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    clip = CLIPTextModelWithProjection(CLIP_SMALL, **kinds)
    outputs, variables = jax.eval_shape(clip.init_with_output, jax.random.key(0), ids)
    assert {x.dtype for x in jax.tree.leaves((outputs, variables))} == {jnp.dtype(jnp.bfloat16)}
    t5 = T5Encoder(T5_SMALL, **kinds)
    params = random_params(t5)
    half = jax.jit(t5.apply)(params, ids)
    assert half.dtype == jnp.bfloat16
    full = jax.jit(T5Encoder(T5_SMALL).apply)(jax.tree.map(lambda x: x.astype(jnp.float32), params), ids)
    assert relative_error(half.astype(jnp.float32), full) < 0.05
