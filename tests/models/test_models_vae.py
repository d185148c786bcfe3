"""The autoencoder against diffusers' AutoencoderKL, and what stands around it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.models import sampling
from unipic2_jax.models.sd3 import vae, vae_tiles
from unipic2_jax.models.sd3.vae import AutoencoderKL, VAEConfig
from unipic2_jax.models.sd3.vae_names import rules
from unipic2_jax.weights import table

SMALL = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32)


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def abstract_params(config):
    images = jax.ShapeDtypeStruct((1, config.downsampling, config.downsampling, config.in_channels), jnp.float32)
    return jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), images)["params"]


def random_params(config):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: 0.2 * generator.normal(size=leaf.shape).astype(np.float32), abstract_params(config)
    )


def images_of(height, width, batch=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    return AutoencoderKL(SMALL), random_params(SMALL)


def encode(module, params, images):
    return jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, images)


def decode(module, params, latents):
    return jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, latents)


@pytest.fixture(scope="module")
def libraries():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    return torch, pytest.importorskip("diffusers", reason="parity tests need diffusers")


def their_model(libraries, config):
    """diffusers' model from the config.json we would write; every parameter random, also those born as 0 or 1."""
    torch, diffusers = libraries
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL.from_config(config.to_dict()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter) + ("norm" in name and name.endswith("weight")))
    return model


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (16, 16)),
        ({"layers_per_block": 2, "block_out_channels": (8, 16, 16, 24)}, (16, 40)),
        ({"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": False}, (8, 20)),
        ({"block_out_channels": (16, 8), "norm_num_groups": 8, "shift_factor": None}, (10, 6)),
    ],
    ids=["square", "two_layers_wide", "quant_convs_no_attention", "narrowing"],
)
def test_matches_diffusers(libraries, changes, size):
    torch, _ = libraries
    config = dataclasses.replace(SMALL, **changes)
    theirs = their_model(libraries, config)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = table.to_flax(rules(config), state, abstract_params(config))
    module, images = AutoencoderKL(config), images_of(*size)

    mean, logvar = encode(module, params, images)
    latents = np.random.default_rng(1).normal(size=mean.shape).astype(np.float32)
    decoded = decode(module, params, latents)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        their_decoded = theirs.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample
    assert relative_error(mean, posterior.mean.permute(0, 2, 3, 1)) <= 1e-4
    assert relative_error(logvar, posterior.logvar.permute(0, 2, 3, 1)) <= 1e-4
    assert relative_error(decoded, their_decoded.permute(0, 2, 3, 1)) <= 1e-4

    back = dict(table.to_torch(rules(config), params))
    assert list(sorted(back)) == sorted(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].tobytes() == tensor.tobytes(), name


def test_gradient_matches_diffusers(libraries):
    torch, _ = libraries
    theirs = their_model(libraries, SMALL)
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    params = table.to_flax(rules(SMALL), state, abstract_params(SMALL))
    images, module = images_of(16, 16), AutoencoderKL(SMALL)

    def loss(p):
        decoded, _, logvar = module.apply({"params": p}, images)
        return jnp.mean(jnp.square(decoded - images)) + 0.1 * jnp.mean(logvar)

    ours = dict(table.to_torch(rules(SMALL), jax.jit(jax.grad(loss))(params)))
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    posterior = theirs.encode(x).latent_dist
    (torch.mean((theirs.decode(posterior.mean).sample - x) ** 2) + 0.1 * posterior.logvar.mean()).backward()
    # Attention does not feel a constant added to every key: that gradient is rounding noise on both sides.
    gradients = {n: p.grad.numpy() for n, p in theirs.named_parameters() if not n.endswith("to_k.bias")}
    worst = max(relative_error(ours[name], gradient) for name, gradient in gradients.items())
    assert worst <= 1e-3


def test_full_size_names_and_shapes(libraries):
    torch, diffusers = libraries
    config = VAEConfig()
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(config.to_dict()).state_dict()
    abstract = abstract_params(config)
    expected = table.expected_shapes(rules(config), abstract)  # raises when a leaf has no rule, or a rule no leaf
    assert expected == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(expected) == 244
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 83_819_683


def test_config_round_trip_with_diffusers(libraries):
    _, diffusers = libraries
    theirs = diffusers.AutoencoderKL.from_config(SMALL.to_dict()).config
    assert VAEConfig.from_dict(theirs) == SMALL
    assert VAEConfig.from_dict(SMALL.to_dict()) == SMALL
    assert VAEConfig.from_dict(VAEConfig().to_dict()) == VAEConfig()


@pytest.mark.parametrize(
    "field", [{"act_fn": "relu"}, {"latents_mean": [0.0] * 4}, {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}]
)
def test_config_refuses_other_networks(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        VAEConfig.from_dict(SMALL.to_dict() | field)


def test_config_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="norm_num_groups=5"):
        dataclasses.replace(SMALL, norm_num_groups=5)


@pytest.mark.parametrize(("batch", "chunk"), [(5, 2), (4, 2), (3, 8), (7, 1), (7, 6)])
def test_chunks_keep_rows_in_order(batch, chunk):
    array = jnp.arange(batch * 3.0).reshape(batch, 3)
    seen = []

    def function(rows):
        seen.append(rows.shape[0])
        return {"twice": 2 * rows, "sum": rows.sum(axis=1)}

    results = vae.map_chunked(function, array, chunk)
    np.testing.assert_array_equal(results["twice"], 2 * array)
    np.testing.assert_array_equal(results["sum"], array.sum(axis=1))
    assert max(seen) <= chunk


def test_chunked_equals_unchunked(small):
    module, params = small
    images = images_of(8, 12, batch=5)
    whole = encode(module, params, images)
    chunked = jax.jit(lambda p, x: vae.encode_chunked(module, p, x, 2))(params, images)
    for a, b in zip(chunked, whole, strict=True):
        assert relative_error(a, b) < 1e-5
    decoded = jax.jit(lambda p, z: vae.decode_chunked(module, p, z, 2))(params, whole[0])
    assert relative_error(decoded, decode(module, params, whole[0])) < 1e-5


def test_chunks_bound_memory(small):
    module, params = small
    # So large that it is not the scratch of single convolutions, up to 8 MB with JAX 0.12, which decides.
    images = jax.ShapeDtypeStruct((16, 128, 128, 3), jnp.float32)

    def temporaries(chunk):
        encode = jax.jit(lambda p, x: vae.encode_chunked(module, p, x, chunk))
        return encode.lower(params, images).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2) < 0.5 * temporaries(16)


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk size is 0"):
        vae.map_chunked(lambda x: x, jnp.zeros((3, 1)), 0)


def test_remat_recomputes_and_changes_nothing():
    config = dataclasses.replace(SMALL, block_out_channels=(8,), mid_block_add_attention=False)
    params = random_params(config)
    images = images_of(4, 4, batch=1)

    def gradient(remat):
        module = AutoencoderKL(config, remat=remat)
        return jax.grad(lambda p: jnp.mean(jnp.square(module.apply({"params": p}, images, method="encode")[0])))

    plain, rematted = (jax.jit(gradient(remat))(params) for remat in ("none", "full"))
    assert jax.tree.structure(plain) == jax.tree.structure(rematted)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematted)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    def convolutions(remat):
        return str(jax.make_jaxpr(gradient(remat))(params)).count("conv_general_dilated[")

    # Each of the three resnets runs its first convolution again on the way back; nothing there needs the second's result.
    assert convolutions("full") == convolutions("none") + 3


def test_samples_follow_the_posterior():
    mean = jnp.full((2000, 1, 1, 2), jnp.array([1.0, -2.0]))
    logvar = jnp.full_like(mean, jnp.log(0.25))
    draws = vae.sample_latents(mean, logvar, jax.random.key(0))
    np.testing.assert_allclose(draws.mean(axis=(0, 1, 2)), [1.0, -2.0], atol=0.05)
    np.testing.assert_allclose(draws.std(axis=(0, 1, 2)), [0.5, 0.5], atol=0.03)
    assert not np.array_equal(draws, vae.sample_latents(mean, logvar, jax.random.key(1)))
    standard = vae.kl_divergence(jnp.zeros(3), jnp.zeros(3))
    np.testing.assert_array_equal(standard, 0)
    np.testing.assert_allclose(vae.kl_divergence(jnp.array(1.0), jnp.log(4.0)), 0.5 * (1 + 4 - 1 - np.log(4.0)), 1e-6)


def test_normalisation_is_the_one_of_sd3():
    latents = jnp.array([0.0609, 1.0609, -3.0])
    normal = vae.normalize(latents, VAEConfig())
    np.testing.assert_allclose(normal[:2], [0.0, 1.5305], atol=1e-6)
    np.testing.assert_allclose(vae.denormalize(normal, VAEConfig()), latents, rtol=1e-6)
    np.testing.assert_allclose(vae.normalize(latents, VAEConfig(shift_factor=None)), latents * 1.5305, rtol=1e-6)


def test_log_variance_is_clipped(small):
    module, params = small
    bias = jnp.array([0.0] * 4 + [100.0, 100.0, -100.0, -100.0])
    kernel = 0 * params["encoder"]["conv_out"]["kernel"]
    conv_out = {"kernel": kernel, "bias": bias}
    params = params | {"encoder": params["encoder"] | {"conv_out": conv_out}}
    _, logvar = encode(module, params, images_of(8, 8))
    np.testing.assert_array_equal(logvar, np.broadcast_to([20.0, 20.0, -30.0, -30.0], logvar.shape))


@pytest.mark.parametrize("shape", [(1, 5, 8, 3), (1, 8, 8, 4), (8, 8, 3), (1, 1, 1, 3), (1, 0, 8, 3)])
def test_images_that_do_not_fit_are_named(small, shape):
    module, params = small
    with pytest.raises(ValueError, match="multiples of 2"):
        module.apply({"params": params}, jnp.zeros(shape), method="encode")


def test_latents_that_do_not_fit_are_named(small):
    module, params = small
    with pytest.raises(ValueError, match="cannot decode latents"):
        module.apply({"params": params}, jnp.zeros((1, 4, 2, 2)), method="decode")


def test_bfloat16_arithmetic_keeps_float32_doors(small):
    module, params = small
    images = images_of(8, 8)
    low = dataclasses.replace(module, dtype=jnp.bfloat16)
    mean, logvar = encode(low, params, images)
    assert mean.dtype == logvar.dtype == jnp.float32
    assert decode(low, params, mean).dtype == jnp.float32
    assert 0 < relative_error(mean, encode(module, params, images)[0]) < 0.1


@pytest.mark.parametrize("height, width", [(40, 72), (72, 32)])
def test_tiles_equal_diffusers(libraries, height, width):
    torch, _ = libraries
    theirs, module = their_model(libraries, SMALL), AutoencoderKL(SMALL)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = table.to_flax(rules(SMALL), state, abstract_params(SMALL))
    theirs.enable_tiling()
    assert theirs.tile_sample_min_size == SMALL.sample_size == 32
    images = images_of(height, width)
    mean, logvar = jax.jit(lambda p, x: vae_tiles.encode_tiled(module, p, x, 32, 3))(params, images)
    with torch.no_grad():
        wanted = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(wanted.mean).sample
    ours = lambda tensor: tensor.permute(0, 2, 3, 1).numpy()
    assert relative_error(mean, ours(wanted.mean)) < 1e-5 and relative_error(logvar, ours(wanted.logvar)) < 1e-5
    pictures = jax.jit(lambda p, z: vae_tiles.decode_tiled(module, p, z, 32, 3))(params, ours(wanted.mean))
    assert relative_error(pictures, ours(decoded)) < 1e-5
    # It is not what the whole picture gives, or the comparison would show nothing.
    assert relative_error(encode(module, params, images)[0], mean) > 1e-3


def test_large_pictures_go_through_in_tiles(small, monkeypatch):
    module, params = small
    monkeypatch.setattr(sampling, "TILE_PIXELS", 32)
    images = images_of(32, 48)
    for got, tiled in zip(
        sampling.encode_moments(module, params, images), vae_tiles.encode_tiled(module, params, images, 32, 4)
    ):
        np.testing.assert_array_equal(got, tiled)
    small_enough = sampling.encode_moments(module, params, images[:, :, :32])
    np.testing.assert_array_equal(
        small_enough[0], module.apply({"params": params}, images[:, :, :32], method="encode")[0]
    )
    latents = np.asarray(got)
    assert sampling.decode_latents(module, params, latents).shape == (2, 32, 48, 3)
    with pytest.raises(ValueError, match="A tile of the VAE is 36 pixels wide; it must be a multiple of 8"):
        vae_tiles.decode_tiled(module, params, latents, 36, 1)
