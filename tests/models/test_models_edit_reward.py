"""EditReward against transformers' model with peft's LoRA and a linear head; its folder; what cannot be read."""

import json
import shutil

import jax
import numpy as np
import pytest
from edit_reward_models import ALPHA, NETWORK, RANK, SPEC, draw, make_model, pictures
from qwen_reference import SMALL, processor, reference, tensors

from unipic2_jax.models.edit_reward import files
from unipic2_jax.models.edit_reward.model import EditRewardModel, Spec, apply, combine, is_edit_reward, pad_to
from unipic2_jax.models.edit_reward.network import EditReward, init_lora, variables
from unipic2_jax.models.qwen import names as qwen
from unipic2_jax.weights import io, table


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "vlm")


def test_it_equals_transformers_with_peft_and_a_linear_head(tmp_path):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    peft = pytest.importorskip("peft", reason="the parity of LoRA needs peft")
    original = reference(SMALL, torch)
    lora, head = draw(files.abstract_lora(SMALL, RANK), 3), draw(files.abstract_head(SMALL, 2), 4)
    files.save_lora(tmp_path, lora, ALPHA, SMALL)
    files.save_head(tmp_path, head)
    params = {"vlm": table.to_flax(qwen.rules(SMALL), tensors(original), NETWORK.abstract(SMALL)), "head": head}
    asked = [
        SPEC.question(*pictures(2, seed), text) for seed, text in enumerate(("make it red", "add a hat to the man"))
    ]
    given = processor(SMALL)(asked, system_prompt=False)
    adapted = peft.PeftModel.from_pretrained(original, tmp_path).eval()
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 7 * SMALL.num_hidden_layers
    made = processor(SMALL).image_processor(
        images=[part["image"] for c in asked for part in c[0]["content"] if part["type"] == "image"],
        return_tensors="pt",
    )
    linear = torch.nn.Linear(SMALL.hidden_size, 2)
    stored = io.Checkpoint(tmp_path, [tmp_path / files.HEAD_FILE])
    linear.load_state_dict({name: torch.from_numpy(np.asarray(stored[name])) for name in ("weight", "bias")})
    with torch.no_grad():
        hidden = adapted.base_model.model.model(
            input_ids=torch.from_numpy(given.input_ids).long(),
            attention_mask=torch.from_numpy(given.valid.astype(np.int64)),
            mm_token_type_ids=torch.from_numpy((given.input_ids == SMALL.image_token_id).astype(np.int64)),
            **made,
        ).last_hidden_state
        want = torch.sigmoid(linear(hidden[:, -1])).numpy()
    read, alpha = files.load_lora(tmp_path, SMALL)
    module = EditReward(SMALL, 2, lora_alpha=alpha)
    got = np.asarray(apply(module, {**params, "head": files.load_head(tmp_path, SMALL, 2), "lora": read}, given))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) <= 1e-4
    plain = np.asarray(apply(module, params, given))
    assert np.linalg.norm(plain - want) / np.linalg.norm(want) > 1e-2


def test_a_new_lora_changes_nothing_and_more_padding_neither(model):
    given = model.prepare(pictures(2), pictures(2, 1), ["make it red", "remove the hat of the man"])
    new = {**model.params, "lora": init_lora(jax.random.key(0), SMALL, RANK)}
    without = {name: tree for name, tree in model.params.items() if name != "lora"}
    np.testing.assert_array_equal(model.apply(new, given), model.apply(without, given))
    tokens, windows = given.input_ids.shape[1], given.vision.frames.shape[1]
    wide = pad_to(given, tokens + 16, windows + 2)
    np.testing.assert_allclose(model.apply(model.params, wide), model.apply(model.params, given), rtol=0, atol=1e-6)
    assert set(variables(model.module, new)) == {"params", "lora"}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_folder_is_read_as_it_was_written(model, tmp_path, full):
    if full:
        params = {name: tree for name, tree in model.params.items() if name != "lora"}
        spec = Spec(model.spec.targets, None, model.spec.template, pixels=256)
        model = EditRewardModel(model.module, params, model.processor, spec)
    model.save(tmp_path / "out")
    moved = tmp_path / "elsewhere"
    if full:  # stands alone
        shutil.move(tmp_path / "out", moved)
        shutil.rmtree(tmp_path / "vlm")
    else:  # finds its vision-language model by a relative path
        moved.mkdir()
        shutil.move(tmp_path / "out", moved / "out")
        shutil.move(tmp_path / "vlm", moved / "vlm")
        moved = moved / "out"
    assert is_edit_reward(moved) and not is_edit_reward(tmp_path)
    again = EditRewardModel.load(moved)
    assert again.spec.targets == model.spec.targets and again.spec.pixels == (256 if full else None)
    for name in model.params:
        jax.tree.map(np.testing.assert_array_equal, again.params[name], model.params[name])
    rows = pictures(3), [np.asarray(p) for p in pictures(3, 1)], ["a", "b", "c"]
    scores = model.score(*rows, batch_size=2)
    np.testing.assert_allclose(again.score(*rows, batch_size=2), scores, rtol=1e-6)
    assert scores.shape == (3, 2) and scores.min() >= 0 and scores.max() <= 1 and np.ptp(scores) > 0
    assert again._apply._cache_size() == 1


def test_a_question_has_its_parts_where_the_template_puts_them():
    (message,) = Spec(template="Do: {instruction}. From{source}{edited}").question(
        "a.png", "b.png", "use {edited} braces"
    )
    assert [part.get("text", part.get("image")) for part in message["content"]] == [
        "Do: use {edited} braces. From",
        "a.png",
        "b.png",
    ]
    assert [part["type"] for part in message["content"]] == ["text", "image", "image"]


def test_scores_become_one_number():
    scores = np.array([[0.25, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(combine(scores, "mean", ("a", "b")), [0.625, 0.5])
    np.testing.assert_allclose(combine(scores, "geometric", ("a", "b")), [0.5, 1e-3])
    np.testing.assert_allclose(combine(scores, "b", ("a", "b")), [1, 1])
    with pytest.raises(ValueError, match="combine is 'c'; use one of geometric, mean, a, b"):
        combine(scores, "c", ("a", "b"))


def test_what_is_no_edit_reward_is_said(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no EditReward folder"):
        EditRewardModel.check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="vlm holds no EditReward; name a folder"):
        EditRewardModel.check(tmp_path / "vlm")
    out = model.save(tmp_path / "out")
    assert EditRewardModel.check(out).targets == ("instruction", "quality")
    (out / "head.safetensors").rename(tmp_path / "head.safetensors")
    with pytest.raises(FileNotFoundError, match=r"head\.safetensors"):
        EditRewardModel.check(out)
    (tmp_path / "head.safetensors").rename(out / "head.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "targets": ["one", "two", "three"]}))
    with pytest.raises(ValueError, match="shape"):
        EditRewardModel.check(out)
    (out / "config.json").write_text(json.dumps({**config, "base": "../gone"}))
    with pytest.raises(FileNotFoundError, match=r"vision-language model \.\./gone of the EditReward .* was not found"):
        EditRewardModel.check(out)
    (out / "config.json").write_text(json.dumps(config))
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="without which"):
        EditRewardModel.check(out)
    with pytest.raises(ValueError, match="several different ones"):
        Spec(("a", "a"))
    with pytest.raises(ValueError, match=r"must have each of .* once"):
        Spec(template="{source}{edited} How good is it?")
