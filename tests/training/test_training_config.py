"""One-sentence answers to wrong configurations and command lines; the optimizer; FLOPs; the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_stage  # noqa: F401 (registers the kind 'toy')

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.models.sd3.flops import forward_flops
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.optim.optimizer import make_optimizer, make_schedule, merge_params, optimizer_fields, split_params
from unipic2_jax.rl.algorithm import Passes
from unipic2_jax.training.config import make_config, to_json, unknown_override, validate
from unipic2_jax.training.curves import smooth
from unipic2_jax.training.metrics import Metrics, read_rows
from unipic2_jax.training.report import compare_stages, table, write_report


def toy(**fields):
    return {"schedule": ("a",), "stages": {"a": {"kind": "toy", **fields}}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (toy(stepz=3), ["config.stages.a.stepz", "'steps'"]),
        (toy(optimizer={"learning_rate": 1}), ["config.stages.a.optimizer.learning_rate", "weight_decay"]),
        (toy(steps="many"), ["config.stages.a.steps", "'many'", "int"]),
        (toy(optimizer=3), ["config.stages.a.optimizer", "dict"]),
        ({**toy(), "sede": 1}, ["config.sede", "'seed'"]),
        ({**toy(), "stages": {"a": {"kind": "flo"}}}, ["'flo'", "'flow'"]),
        ({**toy(), "stages": {"a": {}}}, ["config.stages.a", "kind"]),
        ({**toy(), "schedule": ("b",)}, ["'b'", "it has a"]),
        ({**toy(), "schedule": ()}, ["schedule"]),
        ({**toy(), "schedule": ("a", "a")}, ["twice"]),
        (toy(steps=0), ["config.stages.a.steps", "at least 1"]),
    ],
)
def test_wrong_configurations_get_one_sentence(values, words):
    with pytest.raises(ConfigError) as error:
        validate(make_config(values))
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_defaults_are_filled_in_free_fields_taken_and_the_whole_locked():
    config = validate(make_config(toy(steps=5, weights={"anything": 2.0})))
    assert config.stages.a.optimizer.betas == (0.9, 0.95) and config.stages.a.weights.anything == 2.0
    with pytest.raises(AttributeError):
        config.stages.a.stpes = 3
    assert '"anything": 2.0' in to_json(config)
    assert unknown_override(config, "stages.a.steps") is None
    assert unknown_override(config, "stages.a.stpes") == "config.stages.a has no field 'stpes'; did you mean 'steps'?"


RECIPE = """
import toy_stage

def get_config(arg=''):
    return toy_stage.toy_config()
"""
# Every case runs in a fork of a process that has imported everything.
COMMANDS = """
import os, sys
sys.path.insert(0, {folder!r})
import toy_stage
from absl import app
from launch import train
from unipic2_jax.training import loop

for number, flags in enumerate({cases!r}):
    if os.fork() == 0:
        os.dup2(os.open(str(number), os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["train", "--config=recipe.py", "--workdir=run", *flags]
        app.run(train.main, flags_parser=train.parse_flags)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
MISTAKES = [
    (["--config.stages.first.optimizer.lrr=1"], ["config.stages.first.optimizer has no field 'lrr'", "'lr'"]),
    (["--config.stages.frist.steps=1"], ["config.stages has no field 'frist'", "'first'"]),
    (["--config.stages.first.steps=few"], ["config.stages.first.steps=few"]),
    (["--confg=x"], ["confg"]),
    (["--config.schedule=('second','third')"], ["'third'"]),
    (["positional"], ["positional"]),
    (["--config=none.py"], ["none.py"]),
]


def test_command_line_mistakes_get_one_sentence(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    script = COMMANDS.format(folder=str(Path(__file__).parents[1] / "support"), cases=[flags for flags, _ in MISTAKES])
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=1800, env=environment
    )
    assert done.stdout.split() == ["1"] * len(MISTAKES), done.stdout + done.stderr
    for number, (_, words) in enumerate(MISTAKES):
        said = (tmp_path / str(number)).read_text().strip()
        assert "\n" not in said and all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_frozen_leaves_cost_nothing_and_the_table_is_never_trained():
    params = {"block": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "pos_embed": {"pos_embed": jnp.ones(4)}}
    trained, frozen = split_params(params, ".*", "pos_embed$")
    assert set(trained) == {"block"} and set(frozen) == {"pos_embed"}
    trained, frozen = split_params(params, "kernel$")
    assert jax.tree.structure(trained) == jax.tree.structure({"block": {"kernel": 0}})
    assert jax.tree.all(jax.tree.map(np.array_equal, merge_params(trained, frozen), params))
    state = make_optimizer(optimizer_fields(), 10).init(trained)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * 4  # Adam's two moments
    with pytest.raises(ConfigError, match="matches no parameter"):
        split_params(params, "pos_embed", "pos_embed$")


def test_adamw_is_pytorchs():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    config = optimizer_fields()
    config.update({"lr": 0.1, "schedule": "cosine", "warmup": 2, "weight_decay": 0.3, "clip_norm": 0.5})
    start = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    params, theirs = jnp.asarray(start), torch.nn.Parameter(torch.tensor(start))
    optimizer, schedule = make_optimizer(config, 8), make_schedule(config, 8)
    state = optimizer.init(params)
    other = torch.optim.AdamW([theirs], lr=0.1, betas=config.betas, eps=config.eps, weight_decay=0.3)
    for step in range(8):
        updates, state = optimizer.update(jnp.cos(params) * (step + 1), state, params)
        params = optax.apply_updates(params, updates)
        theirs.grad = torch.cos(theirs.detach()) * (step + 1)
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        other.param_groups[0]["lr"] = float(schedule(step))
        other.step()
    np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert float(schedule(0)) == 0 and float(schedule(2)) == pytest.approx(0.1) and float(schedule(8)) < 1e-8


@pytest.mark.parametrize("references", [0, 1])
def test_flops_agree_with_what_the_compiler_counts(references):
    # One block of each sort: the compiler counts the body of a scan once.
    config = MMDiTConfig(
        sample_size=16,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=128,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    )
    model = MMDiT(config, remat="none")
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    inputs = [shape(1, 16, 16, 16), shape(1), shape(1, 20, 96), shape(1, 64)]
    if references:
        inputs.append(shape(1, 1, 16, 16, 16))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    counted = jax.jit(model.apply).lower(params, *inputs).compile().cost_analysis()["flops"]
    ours = forward_flops(config, 64, 20, 64 * references)
    assert 0.93 < ours / counted < 1.02


def test_grpo_flops():
    assert Passes(80, trained=72, watched=0).flops(10) == (800, 10 * 72 * 2)
    assert Passes(80, trained=72, watched=36).flops(10, trains_weights=True) == (800, 10 * (72 * 3 + 36))


def test_records_are_cut_to_the_resumed_step(tmp_path):
    place = lambda step: {"stage": "a", "stage_index": 0, "step": step, "total_step": step}
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.train(place(step), {"loss": float(step)})
        if step in (2, 5):
            metrics.evaluation(place(step), {"metrics": {"x": 1.0}, "scores": {"x": [1.0, float("nan")]}})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "sta')  # killed while writing
    Metrics(tmp_path, 3).close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("evaluation", 2), ("train", 3)]
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["0_a_0000002.json"]


def test_smooth_keeps_constants_and_length():
    assert smooth(np.ones(37)) == pytest.approx(np.ones(37))
    assert smooth(np.arange(3.0)).shape == (3,)


def record(stage, index, step, scores):
    return {"stage": stage, "stage_index": index, "step": step, "metrics": {}, "scores": scores}


def test_report_compares_first_and_last_of_each_stage(tmp_path):
    before, after = [0.1, 0.2, None, 0.4], [0.3, 0.5, 0.9, 0.6]
    records = [
        record("edit", 0, 0, {"s": before}),
        record("edit", 0, 5, {"s": [0.0] * 4}),
        record("edit", 0, 9, {"s": after}),
        record("t2i", 1, 0, {"s": after}),
    ]
    found = compare_stages(records)
    assert set(found) == {"edit", "all stages"} and found["all stages"] == found["edit"]  # t2i has only begun
    comparison = found["edit"]["s"]
    assert (comparison.prompts, comparison.dropped) == (3, 1)
    assert comparison.difference == pytest.approx((0.2 + 0.3 + 0.2) / 3) and comparison.risen
    assert "| edit | s | 0.233 | 0.467 | +0.233 [+0.200, +0.300] ▲ | 3 |" in table(found)
    (tmp_path / "evaluations").mkdir()
    assert write_report(tmp_path).read_text().startswith("# Run")


def test_a_watched_reward_that_falls_while_a_trained_one_rises_is_named(tmp_path):
    rewards = {"detector": {"weight": 1.0}, "people": {"weight": 0.0}}
    stages = {"edit": {"rewards": rewards}, "t2i": {"rewards": {"detector": {"weight": 1.0}}}}
    (tmp_path / "config.json").write_text(json.dumps({"stages": stages}))
    rng = np.random.default_rng(0)

    def write(people):
        rows = [
            {
                **{"kind": "train", "stage": stage, "stage_index": index, "step": step, "total_step": step},
                "reward_detector": 0.5 + 0.004 * step + 0.01 * rng.normal(),
                **({"reward_people": 0.5 + people * step + 0.01 * rng.normal()} if stage == "edit" else {}),
            }
            for index, stage in enumerate(("edit", "t2i"))
            for step in range(50)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return write_report(tmp_path).read_text()

    text = write(-0.004)
    assert "| edit | detector | trained |" in text and "| edit | people | watched |" in text and "| t2i |" not in text
    assert "**In stage 'edit' people fell while detector rose" in text
    assert "fell while" not in write(0.004) and "fell while" not in write(0.0)
