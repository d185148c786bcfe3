"""The text conditioner against diffusers' SD3 pipeline, and the tokenizers built from a word list."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.models.sd3 import clip_names as clip_weights
from unipic2_jax.models.sd3 import t5_names as t5_weights
from unipic2_jax.models.sd3.clip import CLIPTextConfig, CLIPTextModelWithProjection
from unipic2_jax.models.sd3.conditioner import TextConditioner, load_tokenizers
from unipic2_jax.models.sd3.t5 import T5Config, T5Encoder
from unipic2_jax.shapes.tokenizers import build_tokenizers, clip_merges, lower_case_charsmap
from unipic2_jax.weights.table import to_flax

# Words inside, before and behind one another, single letters, punctuation: all that could break a merge.
WORDS = ["a", "red", "green", "circle", "cat", "cats", "scat", "catalog", "at", "s", "t", "the", "two", "3", ",", "."]
WORDS += ["!", "-", "left", "of", "remove", "all"]
PROMPTS = [
    "a red circle",
    "",
    "A Red CIRCLE, left of two cats!",
    "a zebra 猫 42",
    "a red circle left of the green cat " * 4,
]
CLIP_LENGTH, T5_LENGTH = 16, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers")
    build_tokenizers(WORDS, CLIP_LENGTH, out)
    return out


@pytest.fixture(scope="module")
def conditioner(folder):
    tokenizers = load_tokenizers(folder)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizers["tokenizer"]),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
    )
    # As in SD3 the second CLIP is wider and uses the exact GELU; here it also has the modern end-of-text id.
    wide = dataclasses.replace(
        clip, hidden_size=32, projection_dim=24, hidden_act="gelu", eos_token_id=len(tokenizers["tokenizer_2"]) - 1
    )
    t5 = T5Config(vocab_size=len(tokenizers["tokenizer_3"]), d_model=64, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return TextConditioner(
        CLIPTextModelWithProjection(clip),
        CLIPTextModelWithProjection(wide),
        T5Encoder(t5),
        **tokenizers,
        max_sequence_length=T5_LENGTH,
        joint_attention_dim=64,
    )


@pytest.fixture(scope="module")
def params(conditioner):
    return jax.jit(conditioner.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def apply(conditioner):
    return jax.jit(conditioner.apply)


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def test_every_word_is_one_token(folder):
    for tokenizer in load_tokenizers(folder).values():
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
        assert [len(i) for i in ids] == [1] * len(WORDS)
        # '!' alone may be CLIP's padding token, as in SD3; all words stay distinct.
        assert len({i[0] for i in ids}) == len(WORDS)
        assert tokenizer.unk_token_id not in {i[0] for i in ids}


def test_tokenizers_follow_sd3(folder):
    first, second, third = load_tokenizers(folder).values()
    vocab = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert vocab["!"] == 0
    assert max(vocab, key=vocab.get) == "<|endoftext|>"
    assert sorted(vocab.values()) == list(range(len(vocab)))
    end = vocab["<|endoftext|>"]
    assert (first.pad_token_id, second.pad_token_id, third.pad_token_id) == (end, 0, 0)
    assert first.model_max_length == second.model_max_length == CLIP_LENGTH
    red, padded = vocab["red</w>"], {"padding": "max_length", "max_length": 5}
    assert first("red", **padded)["input_ids"] == [vocab["<|startoftext|>"], red, end, end, end]
    assert second("red", **padded)["input_ids"] == [vocab["<|startoftext|>"], red, end, 0, 0]
    assert third("red", **padded)["input_ids"] == [third.convert_tokens_to_ids("▁red"), 1, 0, 0, 0]


def test_tokenizers_ignore_case_and_survive_any_text(folder):
    for tokenizer in load_tokenizers(folder).values():
        assert tokenizer("A RED Circle")["input_ids"] == tokenizer("a red circle")["input_ids"]
        for text in ("zebra", "Ünïcode 猫 🙂", "\n\t", "x" * 300, "\x00", "<|endoftext|>", "</s>"):
            ids = tokenizer(text)["input_ids"]
            assert ids and max(ids) < len(tokenizer)
    first, _, third = load_tokenizers(folder).values()
    assert first.tokenize("zebra") == ["z", "e", "b", "r", "a</w>"]
    assert third.tokenize("zebra") == ["▁", "z", "e", "b", "r", "a"]
    assert third("猫", add_special_tokens=False)["input_ids"][-1] == third.unk_token_id
    # Bytes cover everything, so CLIP's <unk>, which is the end-of-text token, never appears inside a prompt.
    assert first("猫 🙂 Ü")["input_ids"].count(first.eos_token_id) == 1


def test_saved_tokenizers_come_back(folder, conditioner, tmp_path):
    conditioner.save_tokenizers(tmp_path)
    for before, after in zip(load_tokenizers(folder).values(), load_tokenizers(tmp_path).values()):
        assert type(before) is type(after) and len(before) == len(after)
        assert before.model_max_length == after.model_max_length
        assert before(PROMPTS)["input_ids"] == after(PROMPTS)["input_ids"]


def test_merges_keep_earlier_words_whole():
    words = ["ab", "abab", "babab", "bab", "aab", "aaaa", "aaa"]
    merges = clip_merges(words)
    assert len(set(merges)) == len(merges)
    ranks = {pair: i for i, pair in enumerate(merges)}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            i = min(range(len(pieces) - 1), key=lambda k: ranks.get((pieces[k], pieces[k + 1]), 10**6))
            assert (pieces[i], pieces[i + 1]) in ranks, (word, pieces)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_the_charsmap_lower_cases():
    import base64

    from tokenizers.normalizers import Precompiled

    assert Precompiled(base64.b64decode(lower_case_charsmap())).normalize_str("AZ Mm[@É1") == "az mm[@É1"


@pytest.mark.parametrize("word", ["Red", "two words", "t-shirt", "42", "", "é"])
def test_words_that_would_split_are_refused(word, tmp_path):
    with pytest.raises(ValueError, match="cannot be one token"):
        build_tokenizers([word], CLIP_LENGTH, tmp_path)


def test_tokenize_shapes_and_truncation(conditioner, caplog):
    with caplog.at_level(logging.WARNING):
        tokens = conditioner.tokenize(PROMPTS)
    assert {k: (v.shape, v.dtype) for k, v in tokens.items()} == {
        "clip_l": ((5, CLIP_LENGTH), np.dtype(np.int32)),
        "clip_g": ((5, CLIP_LENGTH), np.dtype(np.int32)),
        "t5": ((5, T5_LENGTH), np.dtype(np.int32)),
    }
    # A cut prompt still ends with the end token.
    assert tokens["clip_l"][4, -1] == conditioner.tokenizer.eos_token_id
    assert tokens["t5"][4, -1] == 1
    cut = [r.getMessage() for r in caplog.records if "were cut" in r.getMessage()]
    assert any(m.startswith("tokenizer keeps 16 tokens; 1 prompt") for m in cut)
    caplog.clear()
    conditioner.tokenize(PROMPTS[0])
    assert not caplog.records
    with pytest.raises(TypeError, match="must be a string but one is int"):
        conditioner.tokenize([1])
    with pytest.raises(ValueError, match="half a character in prompt"):
        conditioner.tokenize(["\ud83d"])


def test_mismatched_parts_are_named(conditioner):
    def with_config(name, **fields):
        module = getattr(conditioner, name)
        return {name: type(module)(dataclasses.replace(module.config, **fields))}

    for changes, message in (
        (with_config("clip_l", vocab_size=10), "tokenizer has .* tokens but its encoder knows 10"),
        (with_config("clip_g", max_position_embeddings=8), "tokenizer_2 has 8 positions"),
        ({"joint_attention_dim": 128}, "T5 is 64 wide but joint_attention_dim is 128"),
        (with_config("clip_l", hidden_size=48) | with_config("clip_g", hidden_size=64), "112 wide"),
        ({"t5": None}, "give both or neither"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(conditioner, **changes)


def test_missing_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer is missing"):
        load_tokenizers(tmp_path)


def test_without_t5_its_part_is_zero(conditioner, params, apply):
    small = dataclasses.replace(conditioner, t5=None, tokenizer_3=None)
    context, pooled = apply(params, conditioner.tokenize(PROMPTS))
    tokens = small.tokenize(PROMPTS)
    assert "t5" not in tokens
    clips = {name: params[name] for name in ("text_encoder", "text_encoder_2")}
    context_without, pooled_without = jax.jit(small.apply)(clips, tokens)
    assert context_without.shape == context.shape == (len(PROMPTS), small.context_length, 64)
    assert pooled.shape == (len(PROMPTS), small.pooled_dim)
    np.testing.assert_array_equal(context_without[:, CLIP_LENGTH:], 0)
    np.testing.assert_allclose(context_without[:, :CLIP_LENGTH], context[:, :CLIP_LENGTH], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled_without, pooled, rtol=1e-5, atol=1e-6)


def test_fresh_conditioner_tells_prompts_apart_and_learns(conditioner, params):
    """From scratch the states have size about one and differ between prompts, and every tensor gets a gradient."""
    tokens = conditioner.tokenize(["a red circle", "a green circle"])

    def loss(p):
        context, pooled = conditioner.apply(p, tokens)
        weigh = lambda x: jnp.vdot(x, jax.random.normal(jax.random.key(1), x.shape))
        return weigh(context) + weigh(pooled), (context, pooled)

    grads, (context, pooled) = jax.jit(jax.grad(loss, has_aux=True))(params)
    for states in (context[:, :CLIP_LENGTH, :48], context[:, CLIP_LENGTH:], pooled):
        assert 0.2 < states.std() < 3
        assert relative_error(states[0], states[1]) > 0.05
    assert [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)] == []


def test_conditioner_equals_diffusers(conditioner, folder, apply, tmp_path):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    import shutil

    import transformers

    torch.manual_seed(0)
    encoders = {
        "text_encoder": transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**conditioner.clip_l.config.to_dict())
        ),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**conditioner.clip_g.config.to_dict())
        ),
        "text_encoder_3": transformers.T5EncoderModel(transformers.T5Config(**conditioner.t5.config.to_dict())),
    }
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2)
    tokenizers = load_tokenizers(folder)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(), vae, **encoders, **tokenizers
    )
    pipeline.save_pretrained(tmp_path)
    # diffusers must also read what `build_tokenizers` wrote itself.
    for name in tokenizers:
        shutil.rmtree(tmp_path / name)
        shutil.copytree(folder / name, tmp_path / name)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert pipeline.tokenizer_max_length == CLIP_LENGTH

    tables = {
        "text_encoder": (clip_weights.rules, conditioner.clip_l),
        "text_encoder_2": (clip_weights.rules, conditioner.clip_g),
        "text_encoder_3": (t5_weights.rules, conditioner.t5),
    }
    abstract = jax.eval_shape(conditioner.init, jax.random.key(0))
    params = {}
    for name, (rules, module) in tables.items():
        source = {k: v.numpy() for k, v in getattr(pipeline, name).state_dict().items()}
        params[name] = to_flax(rules(module.config), source, abstract[name])

    with torch.no_grad():
        want_context, _, want_pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
    context, pooled = apply(params, conditioner.tokenize(PROMPTS))
    assert relative_error(context, want_context.numpy()) <= 1e-4
    assert relative_error(pooled, want_pooled.numpy()) <= 1e-4
    for row in range(len(PROMPTS)):
        assert relative_error(context[row, :CLIP_LENGTH], want_context[row, :CLIP_LENGTH].numpy()) <= 1e-4
        assert relative_error(context[row, CLIP_LENGTH:], want_context[row, CLIP_LENGTH:].numpy()) <= 1e-4
