"""Teaching the vision-language model to answer: the loss against transformers', and a stage that learns."""

import dataclasses
import types
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from qwen_reference import IMAGE, SMALL, processor, reference, tensors

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.questions import make_questions
from unipic2_jax.evaluation.vqa import score_answers
from unipic2_jax.models.qwen import names as qwen
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL
from unipic2_jax.models.registry import NETWORKS
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training.config import make_stage
from unipic2_jax.training.stage import StageContext, stage_class
from unipic2_jax.training.stages.vlm_loss import answer_loss
from unipic2_jax.weights.table import to_flax

NETWORK = NETWORKS[SMALL.CLASS_NAME]
PROCESSOR = processor(SMALL)


def conversations(*texts):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    content = lambda text: [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return [[{"role": "user", "content": content(text)}] for text in texts]


def test_answers_are_what_is_learned():
    batch, is_answer = PROCESSOR.with_answers(conversations("how many?", "where?"), ["two", "at the top left"])
    decode = lambda row: PROCESSOR.tokenizer.decode(batch.input_ids[row][is_answer[row]]).replace(" ", "")
    assert [decode(0), decode(1)] == ["two<|im_end|>", "atthetopleft<|im_end|>"]
    prompt = PROCESSOR(conversations("how many?"))
    given = batch.input_ids[0][batch.valid[0] & ~is_answer[0]]
    np.testing.assert_array_equal(given, prompt.input_ids[0][prompt.valid[0]])


def test_the_loss_equals_transformers():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    model = reference(SMALL, torch)
    batch, is_answer = PROCESSOR.with_answers(conversations("how many?", "where?"), ["two", "at the top left"])
    made = PROCESSOR.image_processor(
        images=[c[0]["content"][0]["image"] for c in conversations("", "")], return_tensors="pt"
    )
    with torch.no_grad():
        want = model(
            input_ids=torch.from_numpy(batch.input_ids).long(),
            attention_mask=torch.from_numpy(batch.valid.astype(np.int64)),
            mm_token_type_ids=torch.from_numpy((batch.input_ids == IMAGE).astype(np.int64)),
            labels=torch.from_numpy(np.where(is_answer, batch.input_ids, -100)).long(),
            **made,
        ).loss
    params = to_flax(qwen.rules(SMALL), tensors(model), NETWORK.abstract(SMALL))
    loss, metrics = jax.jit(lambda p: answer_loss(Qwen2_5_VL(SMALL), p, batch, is_answer))(params)
    assert abs(float(loss) / float(want) - 1) <= 1e-4
    assert 0 <= metrics["answer_accuracy"] <= metrics["token_accuracy"] <= 1
    # 'two' and 'at the top left' are of different lengths; the mean of their own losses is another number.
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, is_answer)) for i in range(2)]
    own = [float(answer_loss(Qwen2_5_VL(SMALL), params, *row)[0]) for row in rows]
    equal = float(answer_loss(Qwen2_5_VL(SMALL), params, batch, is_answer, equal_answers=True)[0])
    assert abs(equal / np.mean(own) - 1) <= 1e-5 and abs(equal / float(loss) - 1) > 1e-3


@dataclasses.dataclass(frozen=True)
class Reader:
    """What the stage needs of a conditioner."""

    vlm: Any
    processor: Any

    @property
    def modules(self):
        return {"vlm": self.vlm}


@dataclasses.dataclass(frozen=True)
class Model:
    conditioner: Any
    params: Any

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def make_model():
    rng = np.random.default_rng(0)
    draw = lambda x: (
        rng.standard_normal(x.shape) * x.shape[-2] ** -0.5 if len(x.shape) > 1 else np.ones(x.shape)
    ).astype("f")
    params = jax.tree.map(draw, NETWORK.abstract(SMALL))
    return Model(
        Reader(Qwen2_5_VL(SMALL), PROCESSOR), {"conditioner": {"vlm": params, "conditioner": {"w": np.ones(3)}}}
    )


def test_a_stage_learns_and_leaves_the_rest_alone(tmp_path):
    shapes = {"kind": "shapes"}
    fields = {"kind": "vlm", "data": shapes, "heldout": {**shapes, "split": "heldout"}, "pool": 512, "text_length": 280}
    fields["forms"] = ("chat", "conditioner")
    config = make_stage({**fields, "batch_size": 16, "optimizer": {"lr": 3e-3}, "steps": 30, "ema_decay": 0.5})
    mesh = make_mesh(jax.devices()[:1])
    model = make_model()
    stage = stage_class("vlm")(config, model, StageContext("vlm", 0, 0, mesh, tmp_path))
    pool, _ = stage._prepared()
    # The second half is put as the conditioner puts prompts: plain positions, and no default system prompt.
    plain = (pool.positions[:, 0] == pool.positions[:, 2]).all(axis=-1)
    assert plain[256:].all() and not plain[:256].all()
    assert pool.valid[:256].sum() > pool.valid[256:].sum() + 256 * 20
    state, losses = stage.init(), []
    for step in range(30):
        state, metrics = stage.step(state, step)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    done = stage.finish(state).params["conditioner"]
    assert done["conditioner"] is model.params["conditioner"]["conditioner"]
    before, after = (tree["embed_tokens"]["embedding"] for tree in (model.params["conditioner"]["vlm"], done["vlm"]))
    assert before.dtype == after.dtype and not np.array_equal(before, after)


def test_only_the_exact_answer_counts():
    source = make_questions({"kind": "shapes", "split": "heldout"}, 5)
    questions = [source.question(i) for i in range(12)]
    right, shares = score_answers(questions, [q.answer for q in questions])
    assert right.all() and shares["overall"] == 1 and len(shares) == 10
    wrong = [q.answer + "s" if q.tag == "color" else q.answer for q in questions]
    _, shares = score_answers(questions, wrong)
    assert shares["color"] == 0 and shares["count"] == 1 and shares["overall"] == 11 / 12


def test_what_cannot_be_trained_is_said(tmp_path):
    fields = {"kind": "vlm", "data": {"kind": "shapes"}, "heldout": {"kind": "shapes"}}
    mesh = make_mesh(jax.devices()[:1])
    with pytest.raises(ConfigError, match="pool is 100"):
        stage_class("vlm").check(make_stage({**fields, "pool": 100}), mesh)
    with pytest.raises(ConfigError, match="use some of chat, conditioner"):
        stage_class("vlm").check(make_stage({**fields, "forms": ("chat", "letter")}), mesh)
    with pytest.raises(ValueError, match="'poems' does not exist; choose one of shapes"):
        make_questions({"kind": "poems"}, 0)

    text = types.SimpleNamespace(conditioner=types.SimpleNamespace(modules={"text_encoder": None}), params={})
    with pytest.raises(ConfigError, match="needs a MetaQuery model"):
        stage_class("vlm")(make_stage(fields), text, StageContext("vlm", 0, 0, mesh, tmp_path))
