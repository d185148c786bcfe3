"""Text generation against transformers' `generate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_reference import IMAGE, SMALL, VIDEO, batch, reference, tensors

from unipic2_jax.models.qwen import names as qwen_weights
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL, mrope_positions
from unipic2_jax.models.qwen.generation import SamplingConfig, choose, generate
from unipic2_jax.models.qwen.vision import pack_images
from unipic2_jax.models.registry import NETWORKS
from unipic2_jax.weights.table import to_flax

NETWORK = NETWORKS["Qwen2_5_VLForConditionalGeneration"]
ROWS = [[3, (IMAGE, 1, 4, 8), 5], [4], [1, (IMAGE, 1, 8, 8), 9]]
NEW = 24


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="parity tests need PyTorch")


@pytest.fixture(scope="module")
def models(torch):
    # Stronger weights than one, so that what is written wanders instead of repeating one token.
    model = reference(SMALL, torch, gain=2.0)
    params = to_flax(qwen_weights.rules(SMALL), tensors(model), NETWORK.abstract(SMALL))
    return model, Qwen2_5_VL(SMALL), {"params": params}


@pytest.fixture(scope="module")
def prompt():
    ids, valid, media = batch(SMALL, ROWS)
    positions = mrope_positions(SMALL, ids, valid, media[IMAGE][1])
    return ids, positions, valid, pack_images(SMALL.vision_config, ids, media), media


def theirs(torch, model, prompt, **options):
    ids, _, valid, _, media = prompt
    patches, grids = (torch.from_numpy(np.asarray(a)) for a in media[IMAGE])
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(valid.astype(np.int64)),
            mm_token_type_ids=torch.from_numpy((ids == IMAGE) + 2 * (ids == VIDEO)),
            pixel_values=patches,
            image_grid_thw=grids,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return out[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_equal_transformers(torch, models, prompt, penalty):
    model, module, params = models
    want = theirs(torch, model, prompt, eos_token_id=None, repetition_penalty=penalty)
    config = SamplingConfig(repetition_penalty=penalty)
    got = generate(module, params, *prompt[:4], max_new_tokens=NEW, config=config)
    np.testing.assert_array_equal(got, want)
    assert all(len(set(row)) > 2 for row in got.tolist())
    # A row ends at a stop token of its own, the others go on, and what follows is padding.
    stop = int(got[1, 5])
    want = theirs(torch, model, prompt, eos_token_id=stop, repetition_penalty=penalty)
    np.testing.assert_array_equal(
        generate(module, params, *prompt[:4], max_new_tokens=NEW, config=config, stop_tokens=(stop,)), want
    )


def test_streaming_gives_the_same_tokens(models, prompt):
    _, module, params = models
    pieces = []
    config = SamplingConfig(temperature=0.8, top_p=0.9)
    options = {"max_new_tokens": NEW, "config": config, "seed": 3}
    streamed = generate(module, params, *prompt[:4], **options, on_tokens=pieces.append, stream_every=5)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), streamed)
    np.testing.assert_array_equal(generate(module, params, *prompt[:4], **options), streamed)
    other = generate(module, params, *prompt[:4], **{**options, "seed": 4})
    assert (other != streamed).any()


def test_top_p_and_temperature_choose_as_often_as_they_should():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.broadcast_to(logits, (20000, 4))
    seen = jnp.zeros(many.shape, bool)

    def shares(**fields):
        tokens = choose(many, seen, jax.random.key(0), SamplingConfig(**fields))
        return np.bincount(tokens, minlength=4) / len(tokens)

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.02)
    # 0.5 + 0.3 does not reach 0.85: the third stays too.
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.85), np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.02)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.4), [1, 0, 0, 0])
    sharp = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), sharp / sharp.sum(), atol=0.02)
    np.testing.assert_allclose(shares(), [1, 0, 0, 0])


def test_bad_numbers_are_refused_before_anything_is_computed(models, prompt):
    _, module, params = models
    for fields, message in (
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**fields)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(module, params, *prompt[:4], max_new_tokens=0)
    with pytest.raises(ValueError, match="exceed the model's 128000 positions"):
        generate(module, params, *prompt[:4], max_new_tokens=128000)
