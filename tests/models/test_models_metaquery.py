"""Conversations for Qwen2.5-VL, and MetaQuery's conditioner against the published scripts' steps in PyTorch."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from connector_reference import SMALL as CONNECTOR
from connector_reference import reference as connector_reference
from PIL import Image
from pipelines_common import SIZES as TEXT_SIZES
from pipelines_common import small_bundle
from qwen_reference import IMAGE, SMALL, processor, reference, tensors

from unipic2_jax import pipelines
from unipic2_jax.models import bundle as bundles
from unipic2_jax.models import convert
from unipic2_jax.models.metaquery import names as connector_weights
from unipic2_jax.models.metaquery.conditioner import MetaQueryConditioner
from unipic2_jax.models.metaquery.connector import MetaQuery
from unipic2_jax.models.qwen import names as qwen_weights
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL
from unipic2_jax.models.qwen.processor import VLMProcessor, bucket
from unipic2_jax.models.registry import NETWORKS
from unipic2_jax.weights import io
from unipic2_jax.weights.table import to_flax

CONFIG = SMALL
PROCESSOR = processor(CONFIG)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def text(batch, row):
    return PROCESSOR.tokenizer.decode(batch.input_ids[row][batch.valid[row]]).replace(" ", "")


def conditioner(positions="1d"):
    return MetaQueryConditioner(Qwen2_5_VL(CONFIG), MetaQuery(CONNECTOR), PROCESSOR, positions)


def test_conversations_of_different_lengths_and_images_make_one_batch():
    batch = PROCESSOR([[user("ab")], [user(picture(16, 8), "c", picture(24, 24), "d")]])
    assert text(batch, 0) == (
        "<|im_start|>system\nYouareahelpfulassistant.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    )
    # 16 x 8 pixels are 2 x 1 merged tokens of 8 x 8, 24 x 24 are 3 x 3.
    assert (batch.input_ids == IMAGE).sum(axis=1).tolist() == [0, 2 + 9]
    assert batch.input_ids.shape[1] == bucket(int(batch.valid[1].sum()), 16) and not batch.valid[0, 0]
    assert (batch.vision.tokens[1] >= 0).sum() == 11 and (batch.vision.tokens[0] == -1).all()
    # The 3-D positions restart nowhere: the text behind an image continues behind its longer edge.
    assert batch.positions.max() < batch.valid.sum(axis=1).max()
    plain = PROCESSOR([[user("ab")]], mrope=False, system_prompt=False)
    assert text(plain, 0).startswith("<|im_start|>user\nab") and plain.vision is None
    assert (plain.positions[:, 0] == plain.positions[:, 2]).all() and plain.positions.max() == plain.valid.sum() - 1


def test_prompts_of_many_lengths_have_few_shapes():
    sizes = {bucket(n, 16) for n in range(1, 1025)}
    assert len(sizes) <= 22 and all(bucket(n) >= n and bucket(n) <= max(1.25 * n, n + 1) for n in range(1, 3000))
    shapes = {PROCESSOR([[user("a" * n)]]).input_ids.shape for n in range(0, 60, 3)}
    assert len(shapes) <= 5


def test_a_saved_processor_is_the_same(tmp_path):
    PROCESSOR.save(tmp_path)
    again = VLMProcessor.load(tmp_path, CONFIG)
    conversation = [[user(picture(20, 12), "what is it?")]]
    for a, b in zip(jax.tree.leaves(PROCESSOR(conversation)), jax.tree.leaves(again(conversation))):
        np.testing.assert_array_equal(a, b)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks preprocessor_config\.json"):
        VLMProcessor.load(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], "role 'tool' is unknown"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "'audio' is unknown"),
        ([user("what is <|image_pad|>?")], r"1 image token\(s\) for 0 image"),
    ],
)
def test_conversations_that_cannot_work_say_why(messages, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR([messages])
    with pytest.raises(ValueError, match="longer than the 8 reserved"):
        PROCESSOR([[user("a long prompt")]], text_length=8)


def test_parts_of_different_models_are_refused():
    with pytest.raises(ValueError, match="use the tokenizer that belongs"):
        VLMProcessor(dataclasses.replace(CONFIG, vocab_size=50), PROCESSOR.tokenizer, PROCESSOR.image_processor)
    with pytest.raises(ValueError, match="image_token_id is 7"):
        VLMProcessor(dataclasses.replace(CONFIG, image_token_id=7), PROCESSOR.tokenizer, PROCESSOR.image_processor)
    connector = MetaQuery(dataclasses.replace(CONNECTOR, llm_hidden_size=32))
    with pytest.raises(ValueError, match="reads states of 32 channels but the vision-language model gives 64"):
        MetaQueryConditioner(Qwen2_5_VL(CONFIG), connector, PROCESSOR)
    with pytest.raises(ValueError, match="positions is '2d'"):
        conditioner("2d")


@pytest.mark.parametrize("edit", [False, True], ids=["t2i", "edit"])
def test_context_and_pooled_equal_the_published_steps(edit):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    vlm, head = reference(CONFIG, torch), connector_reference(CONNECTOR, torch)
    ours = conditioner()
    prompts = ["make it red", "blurry, low quality, and a longer prompt"]
    image = picture(32, 16) if edit else None
    tokens = ours.tokenize(prompts, [[image]] * 2 if edit else None)
    shown = text(tokens, 0).replace("<|image_pad|>", "")
    start = "<|vision_start|><|vision_end|>" if edit else "Generateanimage:"
    assert shown == f"<|im_start|>user\n{start}makeitred<|im_end|>\n<|im_start|>assistant\n"
    queries = CONNECTOR.num_queries
    with torch.no_grad():
        ids = torch.from_numpy(np.pad(tokens.input_ids, ((0, 0), (0, queries)))).long()
        mask = torch.from_numpy(np.pad(tokens.valid, ((0, 0), (0, queries)), constant_values=True).astype(np.int64))
        embeddings = vlm.get_input_embeddings()(ids)
        embeddings[:, -queries:] = head.meta_queries
        if edit:
            small = int(16 * 28 / 32 * 32 * 28 / 32)
            limits = {"shortest_edge": small, "longest_edge": small}
            made = PROCESSOR.image_processor(images=[image] * 2, return_tensors="pt", size=limits)
            images = vlm.model.visual(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
            embeddings[ids == IMAGE] = images
        hidden = vlm.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
        want = head(hidden[:, -queries:])
    params = {
        "vlm": to_flax(qwen_weights.rules(CONFIG), tensors(vlm), NETWORKS[CONFIG.CLASS_NAME].abstract(CONFIG)),
        "conditioner": to_flax(
            connector_weights.rules(CONNECTOR),
            {k: v.detach().numpy() for k, v in head.state_dict().items()},
            NETWORKS[CONNECTOR.CLASS_NAME].abstract(CONNECTOR),
        ),
    }
    got = jax.jit(ours.apply)(params, tokens)
    for a, b in zip(got, want):
        assert a.shape == b.shape
        assert np.linalg.norm(np.asarray(a) - b.numpy()) / np.linalg.norm(b) <= 1e-4
    assert np.abs(got[0][0] - got[0][1]).max() > 1e-2
    if edit:
        # Released weights are used with plain positions; the other mode differs.
        other = conditioner("mrope")
        changed = jax.jit(other.apply)(params, other.tokenize(prompts, [[image]] * 2))
        assert np.abs(changed[0] - got[0]).max() > 1e-3


TRANSFORMER = TEXT_SIZES.networks["transformer"]
SIZES = dataclasses.replace(
    TEXT_SIZES,
    family="metaquery",
    networks={
        "transformer": TRANSFORMER,
        "vae": TEXT_SIZES.networks["vae"],
        "conditioner": dataclasses.replace(
            CONNECTOR,
            joint_attention_dim=TRANSFORMER.joint_attention_dim,
            pooled_projection_dim=TRANSFORMER.pooled_projection_dim,
        ),
        "vlm": CONFIG,
    },
    tokenizers=None,
    settings={"vision_scale": 1.0, "max_sequence_length": 90, "edit_negative": "bad"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole model of small networks with MetaQuery's conditioner, saved."""
    made = small_bundle(SIZES, tokenizers=PROCESSOR)
    return bundles.save_bundle(made, tmp_path_factory.mktemp("metaquery") / "model"), made


def test_a_folder_in_the_published_layout_is_read_back(folder):
    folder, made = folder
    assert {p.name for p in folder.iterdir()} == {
        "transformer", "vae", "conditioner", "vlm", "scheduler", "unipic2.json"
    }  # fmt: skip
    loaded = bundles.load_bundle(folder)
    assert type(loaded.conditioner) is MetaQueryConditioner and loaded.conditioner.vision_scale == 1.0
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(made.params), strict=True):
        np.testing.assert_array_equal(a, b)
    settings = json.loads((folder / "unipic2.json").read_text())
    own = {"vision_scale": 1.0, "max_sequence_length": 90, "edit_negative": "bad", "reference_path": "both"}
    assert settings == {"positions": "1d", **own}


def test_the_pipeline_takes_either_conditioner(folder):
    pipe = pipelines.load(folder[0])
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "num_images_per_prompt": 1}
    first, again, other = (pipe(p, **options).images for p in ("a cat", "a cat", "a dog"))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4
    # The vision-language model sees the picture: another one changes the edit through the context, too.
    edits = [pipe("red", image=picture(16, 16, seed), **options).images for seed in (0, 1)]
    assert np.abs(edits[0] - edits[1]).max() > 1e-4
    plain = pipe("red", image=picture(16, 16, 0), negative_prompt="", **options).images
    assert np.abs(edits[0] - plain).max() > 1e-5  # an edit has a negative prompt of its own


def test_a_prompt_is_read_once_however_many_pictures_it_gives(folder):
    pipe = pipelines.load(folder[0])
    read, encode = [], pipe._encode_text
    pipe._encode_text = lambda params, tokens: read.append(len(tokens.input_ids)) or encode(params, tokens)
    options = {"num_inference_steps": 1, "height": 16, "width": 16, "num_images_per_prompt": 3, "output_type": "np"}
    image = picture(16, 16)
    one_by_one = pipe(["red", "blue"], image=image, batch_size=1, **options).images
    assert read == [2, 1]  # 'red' and what edits should not be, then 'blue'
    together = pipe(["red", "blue"], image=image, **options).images
    np.testing.assert_allclose(one_by_one, together, atol=1e-4)


def test_conversion_keeps_names_and_bits(folder, tmp_path):
    convert.from_torch(folder[0], tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    for part in ("conditioner", "vlm", "transformer", "vae"):
        before, after = (io.open_folder(base / part) for base in (folder[0], tmp_path / "back"))
        assert set(before) == set(after)
        assert all(np.array_equal(np.asarray(before[k]), np.asarray(after[k])) for k in before)
    assert (tmp_path / "back/vlm/tokenizer_config.json").is_file()
    native = bundles.load_bundle(tmp_path / "native")
    for a, b in zip(jax.tree.leaves(native.params), jax.tree.leaves(folder[1].params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_folders_that_lack_a_part_say_which(folder, tmp_path):
    shutil.copytree(folder[0], tmp_path / "model")
    (tmp_path / "model/unipic2.json").write_text('{"positoins": "1d"}')
    with pytest.raises(ValueError, match="has the field 'positoins'"):
        bundles.load_bundle(tmp_path / "model")
    shutil.rmtree(tmp_path / "model/vlm")
    with pytest.raises(FileNotFoundError, match="lacks the folder vlm/"):
        bundles.load_bundle(tmp_path / "model")


def test_a_model_is_put_together_from_parts(folder, tmp_path):
    folder, made = folder
    parts = {name: folder / name for name in ("transformer", "vae", "vlm")}
    new = bundles.init_bundle(SIZES, seed=3, parts=parts)
    given, old = new.params, made.params
    for a, b in (
        (given["transformer"], old["transformer"]),
        (given["vae"], old["vae"]),
        (given["conditioner"]["vlm"], old["conditioner"]["vlm"]),
    ):
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    queries = [tree["conditioner"]["conditioner"]["meta_queries"] for tree in (given, old)]
    assert queries[0].shape == queries[1].shape and not np.array_equal(*queries)
    assert not given["conditioner"]["conditioner"]["projector_3"]["kernel"].any()
    other = bundles.init_bundle(SIZES, seed=3, parts=parts, zero_projectors=False).params["conditioner"]["conditioner"]
    assert other["projector_3"]["kernel"].any()
    # The tokenizer comes with the vision-language model.
    assert (new.conditioner.tokenize(["a"]).input_ids == made.conditioner.tokenize(["a"]).input_ids).all()
    with pytest.raises(ValueError, match="has no part 'text_encoder'; it has transformer, vae, conditioner, vlm"):
        bundles.init_bundle(SIZES, parts={"text_encoder": folder / "vlm"})
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json; name the folder of one network"):
        bundles.init_bundle(SIZES, parts={"vlm": tmp_path / "nowhere"})
    # A vision-language model of another width than the conditioner reads.
    wide = tmp_path / "wide"
    shutil.copytree(folder / "vlm", wide)
    config = json.loads((wide / "config.json").read_text())
    config["vision_config"]["out_hidden_size"] = 128
    (wide / "config.json").write_text(json.dumps({**config, "hidden_size": 128, "num_attention_heads": 8}))
    with pytest.raises(ValueError, match="the vision-language model gives 128; they are from different models"):
        bundles.init_bundle(SIZES, parts={"vlm": wide})
