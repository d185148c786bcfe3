"""The models that ship with the project do what they are said to do."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import pdtr
from unipic2_jax import pipelines
from unipic2_jax.core.assets import TINY, TINY_EDIT_REWARD, TINY_METAQUERY
from unipic2_jax.data.questions import make_questions
from unipic2_jax.evaluation.vqa import answer_questions, score_answers
from unipic2_jax.models.edit_reward.model import EditRewardModel, combine
from unipic2_jax.models.qwen.processor import user_message
from unipic2_jax.pipelines.chat import ChatModel
from unipic2_jax.shapes.edits import EDIT_TYPES, random_edit
from unipic2_jax.shapes.verify import read_scenes
from unipic2_jax.shapes.world import Scene, Thing, render
from unipic2_jax.training import loop

SCENE = Scene("white", (Thing(2, "circle", "red"), Thing(6, "square", "blue", "small")))


def test_all_weights_together_are_small():
    total = sum(file.stat().st_size for file in Path(TINY).parent.glob("tiny*/**/*.safetensors"))
    assert total <= 20e6, f"{total / 1e6:.2f} MB"


@pytest.mark.parametrize("folder", [TINY, TINY_METAQUERY], ids=["text", "metaquery"])
def test_it_generates_and_edits(folder):
    pipe = pipelines.load(folder)
    options = {"num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "np"}
    drawn = pipe("a red circle", num_images_per_prompt=8, **options).images
    scenes = read_scenes((drawn * 255).round().astype(np.uint8))
    right = [len(s.things) == 1 and s.things[0].name == "red circle" for s in scenes]
    assert np.mean(right) >= 0.5, scenes
    edited = pipe(
        ["make the red circle green", "remove the blue square"], image=Image.fromarray(render(SCENE)), **options
    )
    green, removed = read_scenes((edited.images * 255).round().astype(np.uint8))
    assert green == SCENE.replace(2, Thing(2, "circle", "green"))
    assert removed == SCENE.replace(6, None)


def test_it_understands():
    model = ChatModel.load(TINY_METAQUERY)
    picture = Image.fromarray(render(SCENE))
    ask = lambda text: model([[user_message([picture], text)]], max_new_tokens=48)[0]
    assert ask("how many circles are there?") == "one"
    assert ask("what color is the square?") == "blue"
    assert ask("describe the image.") == "a red circle at the top right and a blue square at the bottom left on white"
    (box,) = model.boxes(ask("locate the red circle. answer in json."), picture)
    assert box.label == "red circle"
    heldout = make_questions({"kind": "shapes", "split": "heldout"}, 99)
    questions = [heldout.question(i) for i in range(64)]
    _, shares = score_answers(questions, answer_questions(model, questions))
    assert shares["overall"] >= 0.9, shares


def test_transformers_gives_the_same_answers():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    from transformers import Qwen2_5_VLForConditionalGeneration

    ours = ChatModel.load(TINY_METAQUERY)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(f"{TINY_METAQUERY}/vlm", dtype=torch.float32).eval()
    picture, config = Image.fromarray(render(SCENE)), ours.module.config
    for text in ("list every object.", "locate the blue square. answer in json."):
        asked = [user_message([picture], text)]
        batch = ours.processor([asked])
        ids = torch.from_numpy(batch.input_ids[batch.valid][None]).long()
        made = ours.processor.image_processor(images=[picture], return_tensors="pt")
        with torch.no_grad():
            out = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == config.image_token_id).long(),
                max_new_tokens=48,
                do_sample=False,
                eos_token_id=list(ours.processor.stop_tokens),
                pad_token_id=0,
                **made,
            )
        assert ours.processor.decode(out[:, ids.shape[1] :].numpy()) == ours([asked], max_new_tokens=48)


def test_the_language_model_reads_pictures_for_the_transformer():
    """Without the picture's tokens in the conditioner the context is another one: what it sees matters."""
    bundle = pipelines.load_bundle(TINY_METAQUERY)
    conditioner = bundle.conditioner
    other = Scene("white", (Thing(0, "circle", "red"), Thing(6, "square", "blue", "small")))
    tokens = conditioner.tokenize(["remove the red circle"] * 2, [[Image.fromarray(render(s))] for s in (SCENE, other)])
    context, _ = jax.jit(conditioner.apply)(bundle.params["conditioner"], tokens)
    assert np.linalg.norm(context[0] - context[1]) > 0.05 * np.linalg.norm(context[0])


def test_reinforcement_takes_it_and_leaves_its_understanding_alone(tmp_path):
    config = pdtr.get_config("tiny,smoke,model=metaquery")
    for stage in config.stages.values():
        stage.evaluations = {}
        stage.use_ema = False  # the average does not move within two steps
    loop.run(config, str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert {record["stage"] for record in trained} == {"edit", "t2i"}
    assert all(np.isfinite(record["loss"]) for record in trained)
    before, after = pipelines.load_bundle(TINY_METAQUERY), pipelines.load_bundle(tmp_path / "export")
    for a, b in zip(*(jax.tree.leaves(bundle.params["conditioner"]) for bundle in (before, after)), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(*(jax.tree.leaves(bundle.params["transformer"]) for bundle in (before, after)), strict=True)
    ]
    assert any(changed)


def test_the_edit_reward_tells_edits_apart():
    """On held-out instructions: what was asked for against nothing."""
    rng = np.random.default_rng(0)
    edits = [random_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)], "heldout") for i in range(70)]
    sources, done = ([render(scene) for scene in side] for side in zip(*((e.source, e.target) for e in edits)))
    model = EditRewardModel.load(TINY_EDIT_REWARD)
    prompts = [edit.prompt for edit in edits]
    right, unedited = (
        combine(model.score(sources, made, prompts), "score", model.spec.targets) for made in (done, sources)
    )
    assert np.mean(right > unedited) >= 0.9, np.mean(right > unedited)
    assert right.mean() - unedited.mean() >= 0.4, (right.mean(), unedited.mean())
