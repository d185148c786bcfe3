"""DeepGen's conditioner and its tables against PyTorch."""

import dataclasses

import deepgen_reference as theirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepgen_reference import LORA, SCALE, SMALL, VLM
from PIL import Image
from qwen_reference import processor, tensors

from unipic2_jax.models.deepgen import names
from unipic2_jax.models.deepgen.conditioner import DeepGenConditioner
from unipic2_jax.models.deepgen.network import DecoderLoRA, DecoderLoRAConfig, DeepGenConfig
from unipic2_jax.models.metaquery.connector import MetaQuery
from unipic2_jax.models.qwen import names as qwen_names
from unipic2_jax.models.qwen.decoder import QWEN2_5_VL_3B, Qwen2_5_VL, example_inputs
from unipic2_jax.models.registry import NETWORKS
from unipic2_jax.weights.table import expected_shapes, to_flax, to_torch

PROCESSOR = processor(VLM)
PROMPTS = ["make it red", "blurry, low quality, and a longer prompt"]


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def conditioner(lora=True, **settings):
    lora = DecoderLoRA(LORA) if lora else None
    return DeepGenConditioner(Qwen2_5_VL(VLM), MetaQuery(SMALL), PROCESSOR, lora=lora, vision_scale=SCALE, **settings)


def shapes_of(init):
    return jax.eval_shape(lambda key: init(key)["params"], jax.random.key(0))


def abstract(config):
    return shapes_of(lambda key: MetaQuery(config).init(key, jnp.zeros((1, 1, config.read_size))))


def arrays(model):
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def plain(named):
    """peft's names without what it wraps, and the update by itself."""
    base = {k.replace(".base_layer.", "."): v for k, v in named.items() if ".lora_" not in k}
    return base, {k.replace(".default.", "."): v for k, v in named.items() if ".lora_" in k}


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


@pytest.fixture(scope="module")
def models():
    """The networks in PyTorch, with a LoRA and without, and their parameters here."""
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    pytest.importorskip("peft", reason="the language model's LoRA is peft's")
    vlm, head = theirs.language_model(torch, LORA), theirs.randomised(theirs.connector(SMALL, torch), torch)
    base, update = plain(tensors(vlm))
    params = {
        "vlm": to_flax(qwen_names.rules(VLM), base, NETWORKS[VLM.CLASS_NAME].abstract(VLM)),
        "conditioner": to_flax(names.rules(SMALL), arrays(head), abstract(SMALL)),
        "lora": to_flax(names.lora_rules(LORA), update, shapes_of(DecoderLoRA(LORA).init)),
    }
    return torch, vlm, head, params


CASES = {
    "text": [[], []],
    "one size": [[(32, 16)], [(32, 16)]],
    "own sizes": [[(32, 48), (16, 16)], [(48, 16)]],
    "mixed": [[], [(16, 32), (32, 32), (16, 16)]],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "frozen"])
def test_context_and_pooled_equal_pytorch(models, case, lora):
    torch, vlm, head, params = models
    rows = [[picture(*size, seed=n) for n, size in enumerate(row)] for row in CASES[case]]
    pixels = [[torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in row] for row in rows]
    ours = conditioner(lora)
    tokens = ours.tokenize(PROMPTS, rows)
    theirs.switch_adapter(vlm, lora)
    with torch.no_grad():
        want = theirs.condition(vlm, head, PROCESSOR, PROMPTS, pixels, torch, tokens.input_ids.shape[1])
    theirs.switch_adapter(vlm, True)
    got = jax.jit(ours.apply)(params if lora else {k: v for k, v in params.items() if k != "lora"}, tokens)
    assert got[0].shape == (2, tokens.input_ids.shape[1] + SMALL.num_queries, SMALL.joint_attention_dim)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) <= 1e-4
    assert relative_error(got[0][0], got[0][1]) > 1e-2


def test_without_spare_room_prompts_are_padded_as_in_the_original(models):
    torch, vlm, head, params = models
    longest = max(len(theirs.words(prompt, [], PROCESSOR.tokenizer)) for prompt in PROMPTS)
    ours = conditioner(max_sequence_length=longest)
    with torch.no_grad():
        want = theirs.condition(vlm, head, PROCESSOR, PROMPTS, [[], []], torch)
    got = jax.jit(ours.apply)(params, ours.tokenize(PROMPTS))
    assert all(relative_error(a, b) <= 1e-4 for a, b in zip(got, want, strict=True))
    # The padding of the shorter prompt is read like everything else: more of it is another context.
    roomy = conditioner(max_sequence_length=longest + 16)
    other = jax.jit(roomy.apply)(params, roomy.tokenize(PROMPTS))
    assert relative_error(other[1], got[1]) > 1e-3


def test_reading_the_queries_alone_needs_no_agreed_length(models):
    params = models[3]
    contexts = []
    for room in (80, 96):
        ours = conditioner(max_sequence_length=room, reads="queries")
        context, pooled = jax.jit(ours.apply)(params, ours.tokenize(PROMPTS))
        assert context.shape[1] == ours.context_length == SMALL.num_queries
        contexts.append((context, pooled))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*contexts, strict=True))


def test_a_new_lora_changes_nothing_and_learns(models):
    params, ours = dict(models[3]), conditioner()
    new = DecoderLoRA(LORA).init(jax.random.key(0))["params"]
    assert abs(float(new["layers"]["mlp"]["up_proj"]["a"].std()) * LORA.r - 1) < 0.1
    tokens = ours.tokenize(PROMPTS, [[picture(16, 16)], []])
    frozen = conditioner(lora=False).apply({k: v for k, v in params.items() if k != "lora"}, tokens)
    for a, b in zip(ours.apply({**params, "lora": new}, tokens), frozen, strict=True):
        np.testing.assert_array_equal(a, b)
    loss = lambda lora: ours.apply({**params, "lora": lora}, tokens)[0].sum()
    gradients = jax.jit(jax.grad(loss))(new)["layers"]
    for part, name, *_ in LORA.matrices():
        # The last layer's states are behind what is read: nothing reaches it.
        reached = np.abs(gradients[part][name]["b"]).max(axis=(1, 2)) > 0
        assert reached.tolist() == [True] * max(SMALL.fused_layers) + [False] * (
            VLM.num_hidden_layers - max(SMALL.fused_layers)
        )


def test_tables_are_read_in_both_directions(models):
    _, vlm, head, params = models
    _, update = plain(tensors(vlm))
    for rules, source, tree in (
        (names.rules(SMALL), arrays(head), params["conditioner"]),
        (names.lora_rules(LORA), update, params["lora"]),
    ):
        back = dict(to_torch(rules, tree))
        assert back.keys() == source.keys() and all(np.array_equal(back[k], source[k]) for k in source)


def test_every_tensor_at_full_size():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    peft = pytest.importorskip("peft", reason="the language model's LoRA is peft's")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config, lora = DeepGenConfig(), DecoderLoRAConfig.of(QWEN2_5_VL_3B)
    assert lora == DecoderLoRAConfig()
    with torch.device("meta"):
        head = theirs.connector(config, torch)
        vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN2_5_VL_3B.to_dict()))
        linear = [name for name, module in vlm.named_modules() if isinstance(module, torch.nn.Linear)]
        decoder = [name for name in linear if name.startswith("model.language_model.layers.")]
        peft.inject_adapter_in_model(peft.LoraConfig(r=64, lora_alpha=128, target_modules=decoder), vlm)
    shapes = lambda named: {k: tuple(v.shape) for k, v in named.items()}
    assert expected_shapes(names.rules(config), abstract(config)) == shapes(head.state_dict())
    _, update = plain(vlm.state_dict())
    assert expected_shapes(names.lora_rules(lora), shapes_of(DecoderLoRA(lora).init)) == shapes(update)
    assert len(update) == 2 * 7 * 36
    base, _ = plain(vlm.state_dict())
    base.pop("lm_head.weight")
    wanted = expected_shapes(
        qwen_names.rules(QWEN2_5_VL_3B), NETWORKS[QWEN2_5_VL_3B.CLASS_NAME].abstract(QWEN2_5_VL_3B)
    )
    newer = lambda name: next(
        (a for r in qwen_names.rules(QWEN2_5_VL_3B) for a, n in r.alias_names() if n == name), name
    )
    assert len(wanted) == len(base) and {newer(name) for name in list(wanted)[:8]} <= base.keys()


def test_parts_that_do_not_fit_say_so():
    wrong = MetaQuery(dataclasses.replace(SMALL, fused_layers=(0, 3)))
    with pytest.raises(ValueError, match="what layer 3 reads but the vision-language model has 3 layers"):
        DeepGenConditioner(Qwen2_5_VL(VLM), wrong, PROCESSOR)
    with pytest.raises(ValueError, match="states of layer 3 are asked of a language model whose 3 layers"):
        Qwen2_5_VL(VLM, states=(3,)).init(jax.random.key(0), *example_inputs(VLM))
    with pytest.raises(ValueError, match="reads is 'some'; choose one of all, queries"):
        conditioner(reads="some")
    with pytest.raises(ValueError, match="updates a vision-language model of other sizes"):
        DeepGenConditioner(Qwen2_5_VL(VLM), MetaQuery(SMALL), PROCESSOR, lora=DecoderLoRA(DecoderLoRAConfig()))
    with pytest.raises(ValueError, match="must be at least 1"):
        DecoderLoRAConfig(r=0)
    with pytest.raises(ValueError, match="names no layer"):
        dataclasses.replace(SMALL, fused_layers=())
    with pytest.raises(ValueError, match="20 x 16 pixels does not divide into tokens of 8 pixels"):
        conditioner().tokenize(["a"], [[picture(20, 16)]])


def test_the_config_is_written_and_read():
    assert DeepGenConfig.from_dict(SMALL.to_dict()) == SMALL
    assert DecoderLoRAConfig.from_dict(LORA.to_dict()) == LORA
