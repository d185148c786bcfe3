"""The MMDiT against diffusers' SD3Transformer2DModel, with and without Kontext references."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.models.sd3 import mmdit
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig, position_table
from unipic2_jax.models.sd3.mmdit_names import rules
from unipic2_jax.weights import table

SMALL = MMDiTConfig(
    sample_size=8,
    in_channels=4,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=12,
    out_channels=4,
    pos_embed_max_size=6,
    dual_attention_layers=(0, 1),
)
VARIANTS = {
    "sd35": SMALL,
    "sd3, no dual attention, no qk norm": dataclasses.replace(SMALL, dual_attention_layers=(), qk_norm=None),
    "every block dual": dataclasses.replace(SMALL, num_layers=2, dual_attention_layers=(0, 1)),
    "one block, patch of 4": dataclasses.replace(
        SMALL, num_layers=1, patch_size=4, dual_attention_layers=(), out_channels=8
    ),
}
# Compiling is most of what these tests cost, and needs no optimisation at this size.
QUICK = {"xla_backend_optimization_level": 0}


def inputs(config=SMALL, batch=2, height=8, width=12, references=0, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    values = {
        "latents": normal(batch, height, width, config.in_channels),
        "timestep": np.linspace(33.3, 1000, batch).astype(np.float32),
        "context": normal(batch, 5, config.joint_attention_dim),
        "pooled": normal(batch, config.pooled_projection_dim),
    }
    if references:
        values["references"] = normal(batch, references, height, width, config.in_channels)
    return values


def abstract_params(config):
    shapes = jax.eval_shape(lambda: MMDiT(config).init(jax.random.key(0), **inputs(config)))
    return shapes["params"]


def random_params(config, seed=0):
    """Every leaf non-zero: freshly initialised modulations are zero and would hide what they multiply."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "pos_embed":
            return np.asarray(
                position_table(config.width, config.pos_embed_max_size, config.sample_size // config.patch_size)
            )
        noise = rng.normal(size=leaf.shape)
        if name == "kernel":
            noise /= math.sqrt(math.prod(leaf.shape[-4 if path[-2].key == "proj" else -2 : -1]))
        return jnp.asarray(
            1 + 0.3 * noise if name == "scale" else noise if name == "kernel" else 0.3 * noise, np.float32
        )

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(np.asarray(want))


@functools.lru_cache
def compiled(config, **options):
    module = MMDiT(config, **{"remat": "none", **options})
    return jax.jit(lambda params, values: module.apply({"params": params}, **values), compiler_options=QUICK)


def apply(params, values, config=SMALL, **options):
    return np.asarray(compiled(config, **options)(params, values))


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


def original(config, params):
    """diffusers' own module with our parameters, by way of the name table."""
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    model = diffusers.SD3Transformer2DModel(**config.to_dict()).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in table.to_torch(rules(config), params)}
    model.load_state_dict(state, strict=True)
    return model


def run_original(model, values, references=(), row=slice(None)):
    import torch
    from kontext_reference import kontext_forward

    nchw = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    latents, text = nchw(values["latents"][row]), torch.from_numpy(values["context"][row])
    timestep, pooled = torch.from_numpy(values["timestep"][row]), torch.from_numpy(values["pooled"][row])
    with torch.no_grad():
        if references is None:
            out = model(latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep).sample
        else:
            out = kontext_forward(model, latents, timestep, text, pooled, [nchw(r) for r in references])
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_without_references_equals_diffusers(name):
    config = VARIANTS[name]
    params, values = random_params(config), inputs(config)
    want = run_original(original(config, params), values, references=None)
    assert np.abs(want).max() > 0.1
    assert relative_error(apply(params, values, config), want) < 1e-4


@pytest.mark.parametrize("count, height, width", [(1, 8, 8), (2, 4, 12)])
def test_references_equal_the_pytorch_kontext(params, count, height, width):
    values = inputs(height=height, width=width, references=count)
    references = [values["references"][:, i] for i in range(count)]
    want = run_original(original(SMALL, params), values, references)
    assert relative_error(apply(params, values), want) < 1e-4
    assert relative_error(run_original(original(SMALL, params), values), want) > 1e-2, "references matter"
    if count == 2:
        # The masked path, given full sizes, must agree as well.
        full = np.broadcast_to(np.array([height, width]), (2, count, 2))
        assert relative_error(apply(params, {**values, "reference_sizes": full}), want) < 1e-4


def test_padded_references_equal_unpadded_samples(params):
    """Every sample has its own references, of other sizes than the target's; PyTorch runs each alone, unpadded."""
    values = inputs(batch=3)
    sizes = np.array([[[8, 12], [4, 6]], [[2, 12], [0, 0]], [[0, 0], [6, 4]]])
    padded = np.full((3, 2, 8, 12, SMALL.in_channels), np.nan, np.float32)
    rng, model = np.random.default_rng(1), original(SMALL, params)
    wanted = []
    for row in range(3):
        references = []
        for slot, (height, width) in enumerate(sizes[row]):
            if height:
                image = rng.normal(size=(1, height, width, SMALL.in_channels)).astype(np.float32)
                padded[row, slot, :height, :width] = image[0]
                references.append(image)
        wanted.append(run_original(model, values, references, slice(row, row + 1)))
    got = apply(params, {**values, "references": padded, "reference_sizes": sizes})
    for row in range(3):
        assert relative_error(got[row], wanted[row][0]) < 1e-4, row


def test_absent_references_change_nothing(params):
    values = inputs(references=2)
    alone = {k: v for k, v in values.items() if k != "references"}
    want = apply(params, alone)
    got = apply(params, {**values, "reference_sizes": np.zeros((2, 2, 2), np.int32)})
    assert relative_error(got, want) < 1e-6
    empty = {**alone, "references": values["references"][:, :0], "reference_sizes": np.zeros((2, 0, 2), np.int32)}
    np.testing.assert_array_equal(apply(params, empty), want)


def test_gradients_are_finite_and_blind_to_padding(params):
    values = inputs(references=1)
    values["reference_sizes"] = np.array([[[4, 6]], [[0, 0]]])
    values["references"][0, 0, 4:] = values["references"][1] = np.nan

    def loss(references, params):
        return jnp.sum(
            MMDiT(SMALL, remat="none").apply({"params": params}, **{**values, "references": references}) ** 2
        )

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)(values["references"], params)
    by_reference, by_params = jax.device_get(gradients)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(by_params))
    assert np.abs(by_reference[0, 0, :4, :6]).min() > 0
    outside = by_reference.copy()
    outside[0, 0, :4, :6] = 0
    assert not outside.any()
    assert not by_params["pos_embed"]["pos_embed"].any(), "the position table is a constant"


@pytest.mark.parametrize("sizes", [None, np.array([[[4, 6]], [[0, 0]]])], ids=["whole", "masked"])
def test_a_token_that_makes_lengths_even_changes_nothing(params, sizes, monkeypatch):
    values = inputs(references=1) | ({} if sizes is None else {"reference_sizes": sizes})

    def both(params):
        return jnp.sum(MMDiT(SMALL, remat="none").apply({"params": params}, **values) ** 2)

    found = {}
    for count in (0, 1):
        monkeypatch.setattr(mmdit, "filler", lambda tokens, dtype, kernel, count=count: count)
        found[count] = jax.device_get(jax.jit(jax.value_and_grad(lambda p: both(p)), compiler_options=QUICK)(params))
    (value, gradient), (padded, others) = found[0], found[1]
    assert float(padded) == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(others)):
        assert np.abs(a).max() < 1e-6 or relative_error(b, a) < 1e-4


def test_remat_and_unrolling_change_no_gradient(params):
    values = inputs(references=1)

    def gradient(**options):
        module = MMDiT(SMALL, **options)
        loss = lambda p: jnp.sum(module.apply({"params": p}, **values) ** 2)
        return jax.device_get(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))

    want = table.flatten(gradient(remat="none"))
    for options in ({"remat": "full", "scan_unroll": 2}, {"remat": "attention"}, {"remat": "dots"}):
        for path, got in table.flatten(gradient(**options)).items():
            assert np.linalg.norm(got - want[path]) <= 1e-4 * np.linalg.norm(want[path]) + 1e-6, (options, path)
    with pytest.raises(ValueError, match="remat is 'everything'; use one of full, attention, dots, none"):
        gradient(remat="everything")


def test_bfloat16_computes_close_to_float32(params):
    values = inputs(references=1)
    want = apply(params, values)
    got = apply(params, values, dtype=jnp.bfloat16)
    assert got.dtype == jnp.float32, "velocities keep the latents' dtype"
    assert 1e-5 < relative_error(got, want) < 5e-2
    stored = jax.eval_shape(lambda: MMDiT(SMALL, param_dtype=jnp.bfloat16).init(jax.random.key(0), **inputs()))
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}


def test_initialisation_starts_from_zero_velocity_and_learns():
    values = inputs(references=1)
    module = MMDiT(SMALL, remat="none")
    params = jax.jit(lambda: module.init(jax.random.key(0), **values), compiler_options=QUICK)()["params"]
    params = jax.device_get(params)
    assert not np.any(apply(params, values))
    for path, leaf in table.flatten(params).items():
        if path.endswith("kernel") and "norm" not in path and "proj_out" not in path:
            fan_in = math.prod(leaf.shape[:-1]) if "pos_embed" in path else leaf.shape[-2]
            assert abs(float(leaf.std()) / math.sqrt(2 / (fan_in + leaf.shape[-1])) - 1) < 0.2, path
    kernel = params["dual_blocks"]["attn"]["to_q"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1, "stacked blocks must not start equal"

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params):
        loss = lambda p: jnp.mean((module.apply({"params": p}, **values) - 1) ** 2)
        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    first, params = step(params)
    for _ in range(20):
        last, params = step(params)
    assert float(last) < 0.5 * float(first)


def test_position_table_equals_diffusers():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="parity tests need diffusers")
    want = embeddings.get_2d_sincos_pos_embed(32, 12, base_size=5, output_type="pt").to(torch.float32).numpy()
    np.testing.assert_allclose(position_table(32, 12, 5)[0], want, atol=1e-6)


def test_full_size_names_and_shapes_equal_the_original():
    """SD3.5-Medium's 908 parameters and its position buffer, none missing, none left over, nothing allocated."""
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    config = MMDiTConfig()
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(**config.to_dict())
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = table.expected_shapes(rules(config), abstract_params(config))
    assert got == want
    assert len(got) == 909
    buffer = got.pop("pos_embed.pos_embed")
    assert buffer == (1, 384 * 384, 1536)
    assert sum(math.prod(shape) for shape in got.values()) == 2_243_171_520


def test_config_reads_and_refuses():
    assert MMDiTConfig.from_dict(MMDiTConfig().to_dict()) == MMDiTConfig()
    old = {k: v for k, v in SMALL.to_dict().items() if k not in ("dual_attention_layers", "qk_norm")}
    assert MMDiTConfig.from_dict(old).dual_attention_layers == ()
    assert MMDiTConfig.from_dict(old).qk_norm is None
    assert dataclasses.replace(SMALL, out_channels=None).out_channels == SMALL.in_channels
    for change, word in [
        ({"dual_attention_layers": (0, 2)}, "first k"),
        ({"dual_attention_layers": tuple(range(9))}, "first k"),
        ({"caption_projection_dim": 31}, "caption_projection_dim"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"num_layers": 0, "dual_attention_layers": ()}, "num_layers"),
    ]:
        with pytest.raises(ValueError, match=word):
            dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": np.zeros((2, 7, 8, 4), np.float32)}, "Latents of 7x8 .* multiples of 2"),
        ({"latents": np.zeros((2, 0, 8, 4), np.float32)}, "Latents of 0x8"),
        ({"latents": np.zeros((2, 14, 8, 4), np.float32)}, "Latents of 14x8 exceed the position table of 12x12"),
        ({"latents": np.zeros((2, 8, 8, 3), np.float32)}, "3 channels but the network takes 4"),
        ({"latents": np.zeros((8, 8, 4), np.float32)}, r"\[B, H, W, C\]"),
        ({"timestep": np.zeros((), np.float32)}, "Timestep"),
        ({"context": np.zeros((2, 5, 23), np.float32)}, "Context must be .*24"),
        ({"pooled": np.zeros((1, 12), np.float32)}, "Pooled text"),
        ({"references": np.zeros((2, 1, 8, 9, 4), np.float32)}, "References of 8x9"),
        ({"references": np.zeros((2, 1, 8, 16, 4), np.float32)}, "References of 8x16 exceed"),
        ({"references": np.zeros((2, 8, 8, 4), np.float32)}, r"\[2, R, H, W, C\]"),
        ({"reference_sizes": np.zeros((2, 1, 2), np.int32)}, "without references"),
        (
            {"references": np.zeros((2, 1, 8, 8, 4), np.float32), "reference_sizes": np.zeros((2, 2, 2), np.int32)},
            "reference_sizes must be",
        ),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda: MMDiT(SMALL).init(jax.random.key(0), **{**inputs(), **change}))
    assert str(error.value).count(". ") == 0, "one sentence"
