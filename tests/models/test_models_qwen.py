"""Qwen2.5-VL against transformers: values on a shrunken config, names and shapes at full size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_reference import IMAGE, SMALL, VIDEO, VISION, batch, reference, tensors

from unipic2_jax.models.qwen import names as qwen_weights
from unipic2_jax.models.qwen.decoder import (
    QWEN2_5_VL_3B,
    QWEN2_5_VL_7B,
    Qwen2_5_VL,
    Qwen2_5_VLConfig,
    init_cache,
    mrope_positions,
    text_positions,
)
from unipic2_jax.models.qwen.vision import Qwen2_5_VLVisionConfig, pack_images, window_order
from unipic2_jax.models.registry import NETWORKS
from unipic2_jax.weights.table import check, expected_shapes, flatten, to_flax, to_torch

NETWORK = NETWORKS["Qwen2_5_VLForConditionalGeneration"]
# Several images in one prompt, none in another, sizes that fill windows and that do not, and unequal lengths.
ROWS = [
    [3, (IMAGE, 1, 4, 8), 5, (IMAGE, 1, 6, 2), 2],
    [4],
    [1, (IMAGE, 1, 8, 8), 9],
]
VIDEO_ROWS = [[2, (VIDEO, 3, 4, 6), 3, (IMAGE, 1, 4, 4), 1], [(VIDEO, 2, 2, 2), 6]]


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def replace(config, **fields):
    return Qwen2_5_VLConfig.from_dict({**config.to_dict(), **fields})


@functools.cache
def random_params():
    rng = np.random.default_rng(0)
    draw = lambda x: (rng.standard_normal(x.shape) * (x.shape[-2] ** -0.5 if len(x.shape) > 1 else 1)).astype(x.dtype)
    return {"params": jax.tree.map(draw, NETWORK.abstract(SMALL))}


def loaded(config, model):
    return {"params": to_flax(qwen_weights.rules(config), tensors(model), NETWORK.abstract(config))}


def torch_media(media, torch):
    names = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}
    return {name: torch.from_numpy(np.asarray(array)) for k in media for name, array in zip(names[k], media[k])}


def token_types(ids):
    return (ids == IMAGE) + 2 * (ids == VIDEO)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("rows", [ROWS, VIDEO_ROWS], ids=["images", "videos"])
def test_hidden_states_and_logits_equal_transformers(rows, tied):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    config = replace(SMALL, tie_word_embeddings=tied)
    model = reference(config, torch)
    ids, valid, media = batch(config, rows)
    seconds = [0.5, 1.0] if VIDEO in media else None
    grids = {token: media[token][1] if token in media else () for token in (IMAGE, VIDEO)}
    with torch.no_grad():
        want = model(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(valid.astype(np.int64)),
            mm_token_type_ids=torch.from_numpy(token_types(ids)),
            output_hidden_states=True,
            **({} if seconds is None else {"second_per_grid_ts": torch.tensor(seconds)}),
            **torch_media(media, torch),
        )
    module, params = Qwen2_5_VL(config), loaded(config, model)
    positions = mrope_positions(config, ids, valid, grids[IMAGE], grids[VIDEO], seconds)
    # A window more than is needed changes nothing.
    needed = pack_images(config.vision_config, ids, media).frames.shape[1]
    vision = pack_images(config.vision_config, ids, media, windows=needed + 1)
    hidden = jax.jit(module.apply)(params, ids, positions, valid, vision)
    logits = module.apply(params, hidden, method="logits")
    assert relative_error(hidden[valid], want.hidden_states[-1].numpy()[valid]) <= 1e-4
    assert relative_error(logits[valid], want.logits.numpy()[valid]) <= 1e-4
    # The images matter, and so do their positions.
    flat = jax.jit(module.apply)(params, ids, text_positions(valid), valid, vision)
    blind = jax.jit(module.apply)(params, ids, positions, valid)
    assert min(relative_error(other[valid], hidden[valid]) for other in (flat, blind)) > 0.02


def test_plain_positions_equal_transformers_given_embeddings_only():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    model = reference(SMALL, torch)
    ids, valid, media = batch(SMALL, ROWS)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.from_numpy(ids).long())
        images = model.model.visual(*(torch.from_numpy(np.asarray(a)) for a in media[IMAGE])).pooler_output
        embeddings[torch.from_numpy(ids == IMAGE)] = images
        mask = torch.from_numpy(valid.astype(np.int64))
        want = model.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state.numpy()
    module, params = Qwen2_5_VL(SMALL), loaded(SMALL, model)
    vision = pack_images(VISION, ids, media)
    got = jax.jit(functools.partial(module.apply, method="embed"))(params, ids, vision)
    assert relative_error(got, embeddings) <= 1e-4
    hidden, _ = jax.jit(functools.partial(module.apply, method="decode"))(params, got, text_positions(valid), valid)
    assert relative_error(hidden[valid], want[valid]) <= 1e-4


@pytest.mark.parametrize("rows", [ROWS, VIDEO_ROWS], ids=["images", "videos"])
def test_positions_equal_transformers(rows):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    model = reference(SMALL, torch)
    ids, valid, media = batch(SMALL, rows)
    grids = {token: media[token][1] if token in media else None for token in (IMAGE, VIDEO)}
    seconds = None if grids[VIDEO] is None else [1.5, 0.7]
    tensor = lambda a: None if a is None else torch.as_tensor(np.asarray(a))
    want, _ = model.model.get_rope_index(
        tensor(ids).long(),
        tensor(token_types(ids)),
        tensor(grids[IMAGE]),
        tensor(grids[VIDEO]),
        tensor(seconds),
        tensor(valid.astype(np.int64)),
    )
    got = mrope_positions(SMALL, ids, valid, *(() if g is None else g for g in grids.values()), seconds)
    np.testing.assert_array_equal(got[:, valid], want.numpy()[:, valid])


def test_a_cache_gives_what_the_whole_sequence_gives():
    ids, valid, media = batch(SMALL, ROWS)
    module, params = Qwen2_5_VL(SMALL), random_params()
    positions = mrope_positions(SMALL, ids, valid, media[IMAGE][1])
    vision = pack_images(VISION, ids, media)
    want = jax.jit(module.apply)(params, ids, positions, valid, vision)
    x = module.apply(params, ids, vision, method="embed")
    length, first = ids.shape[1], ids.shape[1] - 5
    room = np.pad(valid, ((0, 0), (0, 3)))
    decode = jax.jit(functools.partial(module.apply, method="decode"))
    start, cache = decode(params, x[:, :first], positions[..., :first], room, init_cache(SMALL, 3, length + 3), 0)
    steps = []
    for place in range(first, length):
        here = slice(place, place + 1)
        hidden, cache = decode(params, x[:, here], positions[..., here], room, cache, jnp.int32(place))
        steps.append(hidden)
    got = jnp.concatenate([start, *steps], axis=1)
    np.testing.assert_allclose(got[valid], want[valid], rtol=2e-4, atol=2e-4)


def test_a_prompt_is_the_same_alone_and_in_a_batch():
    module, params = Qwen2_5_VL(SMALL), random_params()
    ids, valid, media = batch(SMALL, ROWS)
    positions = mrope_positions(SMALL, ids, valid, media[IMAGE][1])
    together = jax.jit(module.apply)(params, ids, positions, valid, pack_images(VISION, ids, media))
    keep = valid[2]
    patches, grids = media[IMAGE]
    alone = {IMAGE: (patches[-64:], grids[-1:])}
    ids, valid = ids[2:, keep], valid[2:, keep]
    positions = mrope_positions(SMALL, ids, valid, grids[-1:])
    got = jax.jit(module.apply)(params, ids, positions, valid, pack_images(VISION, ids, alone))
    np.testing.assert_allclose(got[0], together[2][keep], rtol=2e-4, atol=2e-4)


def test_rematerialised_gradients_are_the_same_and_finite_where_slots_are_empty():
    ids, valid, media = batch(SMALL, ROWS[:2])
    positions = mrope_positions(SMALL, ids, valid, media[IMAGE][1])
    vision = pack_images(VISION, ids, media, windows=6)

    def loss(params, module):
        return jnp.sum(jnp.where(valid[..., None], module.apply(params, ids, positions, valid, vision), 0) ** 2)

    plain, remat = (
        jax.jit(jax.grad(functools.partial(loss, module=Qwen2_5_VL(SMALL, remat=r))))(random_params())
        for r in ("none", "full")
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat)):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(a).max())
    assert np.abs(plain["params"]["visual"]["patch_embed"]["kernel"]).max() > 0


def test_windows_hold_every_token_once():
    order = window_order(VISION, (2, 6, 10))
    assert order.shape == (2 * 2 * 3, 4)
    np.testing.assert_array_equal(np.sort(order[order >= 0]), np.arange(2 * 3 * 5))
    # A window never reaches into the next frame: 15 tokens a frame.
    assert all(len(set(row[row >= 0] // 15)) == 1 for row in order)


@pytest.mark.parametrize("prefix", ["old", "new"])
def test_weights_round_trip_from_either_prefix(prefix):
    rules, params = qwen_weights.rules(SMALL), random_params()["params"]
    stored = dict(to_torch(rules, params))
    assert "visual.blocks.0.attn.qkv.weight" in stored and "model.layers.2.self_attn.k_proj.bias" in stored
    source = stored
    if prefix == "new":
        swap = {"visual.": "model.visual.", "model.": "model.language_model."}
        newer = lambda n: next((new + n[len(old) :] for old, new in swap.items() if n.startswith(old)), n)
        source = {newer(name): array for name, array in stored.items()}
    back = dict(to_torch(rules, to_flax(rules, source, NETWORK.abstract(SMALL))))
    assert back.keys() == stored.keys() and all(np.array_equal(back[k], stored[k]) for k in stored)


def test_a_missing_tensor_is_named_as_the_file_would():
    rules, params = qwen_weights.rules(SMALL), random_params()["params"]
    source = dict(to_torch(rules, params))
    del source["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"lacks the tensor 'model.layers.1.mlp.up_proj.weight'"):
        check(rules, source, NETWORK.abstract(SMALL))


@pytest.mark.parametrize("config", [QWEN2_5_VL_7B, QWEN2_5_VL_3B], ids=["7b", "3b"])
def test_every_tensor_at_full_size(config):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    from transformers import Qwen2_5_VLConfig as HFConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

    with torch.device("meta"):
        model = HFModel(HFConfig(**config.to_dict()))
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    newer = dict(pair for rule in qwen_weights.rules(config) for pair in rule.alias_names())
    ours = {v: k for k, v in newer.items()}
    expected = expected_shapes(qwen_weights.rules(config), NETWORK.abstract(config))
    assert {ours.get(k, k): v for k, v in expected.items()} == shapes
    if config is QWEN2_5_VL_7B:
        assert len(expected) == 729
        assert sum(int(np.prod(s)) for s in expected.values()) == 8_292_166_656


def test_configs_read_either_layout():
    flat = SMALL.to_dict()
    assert Qwen2_5_VLConfig.from_dict(flat) == SMALL
    transformers = pytest.importorskip("transformers")
    nested = transformers.Qwen2_5_VLConfig(**flat).to_dict()
    assert Qwen2_5_VLConfig.from_dict(nested) == SMALL


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "sum to half of the heads' 16"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "'yarn' are not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"vision_config": {**VISION.to_dict(), "out_hidden_size": 32}}, "different models"),
    ],
)
def test_configs_that_cannot_work_say_why(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)
    with pytest.raises(ValueError, match="less than one merged token"):
        Qwen2_5_VLVisionConfig(window_size=20)


def test_images_that_do_not_fit_their_tokens_are_named():
    ids, _, media = batch(SMALL, ROWS)
    patches, grids = media[IMAGE]
    few = {IMAGE: (patches[: 32 + 12], grids[:2])}
    with pytest.raises(ValueError, match="Prompt 2 has more image tokens than images"):
        pack_images(VISION, ids, few)
    with pytest.raises(ValueError, match=r"1 image\(s\) have no image tokens"):
        pack_images(VISION, ids[:2], media)
    wrong = {IMAGE: (patches, grids[[2, 1, 0]])}
    with pytest.raises(ValueError, match="patches needs 16 in a row"):
        pack_images(VISION, ids, wrong)
    with pytest.raises(ValueError, match="do not fit the grids"):
        pack_images(VISION, ids, {IMAGE: (patches[:-1], grids)})
    with pytest.raises(ValueError, match="fill 4 windows but 3 are reserved"):
        pack_images(VISION, ids, media, windows=3)


def test_the_tree_has_no_leaf_without_a_rule():
    names = {rule.path for rule in qwen_weights.rules(SMALL)}
    assert names == set(flatten(NETWORK.abstract(SMALL)))
