"""Conversations for Qwen2.5-VL, and MetaQuery's conditioner against the published scripts' steps in PyTorch."""

import dataclasses

import jax
import numpy as np
import pytest
from connector_reference import SMALL as CONNECTOR
from connector_reference import reference as connector_reference
from PIL import Image
from qwen_reference import IMAGE, SMALL, processor, reference, tensors

from unipic2_jax.models.connector import MetaQuery
from unipic2_jax.models.qwen import Qwen2_5_VL
from unipic2_jax.pipelines.metaquery import MetaQueryConditioner
from unipic2_jax.pipelines.vlm import VLMProcessor, bucket
from unipic2_jax.weights import connector as connector_weights
from unipic2_jax.weights import qwen as qwen_weights
from unipic2_jax.weights.registry import NETWORKS
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
    assert batch.input_ids.shape[1] == bucket(int(batch.valid[1].sum()), 32) and not batch.valid[0, 0]
    assert (batch.vision.tokens[1] >= 0).sum() == 11 and (batch.vision.tokens[0] == -1).all()
    # The 3-D positions restart nowhere: the text behind an image continues behind its longer edge.
    assert batch.positions.max() < batch.valid.sum(axis=1).max()
    plain = PROCESSOR([[user("ab")]], mrope=False, system_prompt=False)
    assert text(plain, 0).startswith("<|im_start|>user\nab") and plain.vision is None
    assert (plain.positions[0] == plain.positions[2]).all() and plain.positions.max() == plain.valid.sum() - 1


def test_prompts_of_many_lengths_have_few_shapes():
    sizes = {bucket(n, 32) for n in range(1, 1025)}
    assert len(sizes) <= 18 and all(bucket(n) >= n and bucket(n) <= max(1.25 * n, n + 1) for n in range(1, 3000))
    shapes = {PROCESSOR([[user("a" * n)]]).input_ids.shape for n in range(0, 60, 7)}
    assert len(shapes) <= 3


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
        PROCESSOR([[user("a long prompt")]], length=8)


def test_parts_of_different_models_are_refused():
    with pytest.raises(ValueError, match="use the tokenizer that belongs"):
        VLMProcessor(dataclasses.replace(CONFIG, vocab_size=50), PROCESSOR.tokenizer, PROCESSOR.image_processor)
    with pytest.raises(ValueError, match="image_token_id is 7"):
        VLMProcessor(dataclasses.replace(CONFIG, image_token_id=7), PROCESSOR.tokenizer, PROCESSOR.image_processor)
    connector = MetaQuery(dataclasses.replace(CONNECTOR, llm_hidden_size=32))
    with pytest.raises(ValueError, match="reads states of 32 channels but the language model gives 64"):
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
    tokens = ours.tokenize(prompts, [image] * 2 if edit else None)
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
            limits = {"min_pixels": small, "max_pixels": small}
            made = PROCESSOR.image_processor(images=[image] * 2, return_tensors="pt", **limits)
            images = vlm.model.visual(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
            embeddings[ids == IMAGE] = images
        hidden = vlm.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
        want = head(hidden[:, -queries:])
    params = {
        "vlm": to_flax(qwen_weights.rules(CONFIG), tensors(vlm), NETWORKS[CONFIG.CLASS_NAME].abstract(CONFIG)),
        "connector": to_flax(
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
        changed = jax.jit(other.apply)(params, other.tokenize(prompts, [image] * 2))
        assert np.abs(changed[0] - got[0]).max() > 1e-3
