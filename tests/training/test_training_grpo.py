"""GRPO as a stage of a run: what it logs, that it learns, failed rewards, several stages, resume, devices."""

import subprocess
import sys
from pathlib import Path

import eight_devices
import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_grpo
from toy_grpo import Brightness

from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training import grpo_stage, loop
from unipic2_jax.training.config import ConfigError
from unipic2_jax.training.metrics import read_evaluations, read_rows
from unipic2_jax.training.stage import StageContext

LOGGED = [
    "reward",
    "reward_std",
    "reward_brightness",
    "reward_brightness_std",
    "reward_brightness_failed",
    "zero_variance_fraction",
    "failed",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clip_fraction",
    "kl",
    "gradient_norm",
    "log_prob_difference",
    "seconds_rollout",
    "seconds_reward",
    "seconds_update",
    "samples_per_second",
    "model_tflops_per_second",
    "loss",
]


@pytest.fixture(autouse=True)
def no_trouble():
    yield
    Brightness.trouble = None


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    config = toy_grpo.config(edit=toy_grpo.stage(edit=True, error_window=2)).stages.edit
    mesh = make_mesh(jax.devices()[:1])
    context = StageContext("edit", 0, 0, mesh, tmp_path_factory.mktemp("stage"))
    return grpo_stage.GRPOStage(config, toy_grpo.load(mesh=mesh), context)


def test_a_step_logs_what_it_did_and_is_on_policy(stage):
    state, metrics = stage.step(stage.init(), 0)
    assert set(LOGGED) <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["log_prob_difference"] < 1e-5 and metrics["failed"] == 0
    assert metrics["reward"] == pytest.approx(metrics["reward_brightness"])
    assert int(state.step) == 2  # two updates per rollout
    again, _ = stage.step(stage.init(), 0)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again)))


def test_a_step_moves_nothing_unasked_and_gives_up_the_old_state(stage):
    state, _ = stage.step(stage.init(), 0)
    with jax.transfer_guard("disallow"):
        new, _ = stage.step(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, stage.params)))


def test_failed_rewards_are_left_out_and_counted(stage):
    Brightness.trouble = lambda values: np.where(np.arange(len(values)) % 4 == 0, np.nan, values)
    _, metrics = stage.step(stage.init(), 0)
    assert metrics["failed"] == metrics["reward_brightness_failed"] == 4
    assert np.isfinite(metrics["reward"]) and metrics["gradient_norm"] > 0


def test_a_reward_that_always_fails_stops_the_run(stage):
    Brightness.trouble = lambda values: np.full_like(values, np.nan)
    stage.failed.clear()
    state = stage.init()
    after, metrics = stage.step(state, 0)
    assert after is state and "reward" not in metrics and metrics["failed"] == 16
    with pytest.raises(
        loop.TrainingError, match="100% of the samples of stage 'edit' could not be scored in the 2 steps up to step 1"
    ):
        stage.step(state, 1)


def test_it_learns(stage):
    state = stage.init()
    before = stage.evaluate(state, 0)
    for step in range(30):
        state, _ = stage.step(state, step)
    after = stage.evaluate(state, 30)
    assert after["metrics"]["toy/brightness"] > before["metrics"]["toy/brightness"] + 0.02
    assert before["scores"]["toy/brightness"].shape == (6, 2) and set(before["images"]) == {"toy"}
    merged = stage.finish(state)
    # Merged weights without LoRA are the tuned policy.
    assert stage.evaluators[0].run(merged.params)["metrics"]["toy/brightness"] == pytest.approx(
        after["metrics"]["toy/brightness"], abs=2e-3
    )


def run(workdir):
    config = toy_grpo.config(edit=toy_grpo.stage(edit=True), t2i=toy_grpo.stage(reference="base"))
    return loop.run(config, workdir, load=toy_grpo.load, save=toy_grpo.save, mesh=make_mesh(jax.devices()[:1]))


def test_a_stage_is_not_measured_again_where_the_one_before_ended(tmp_path, monkeypatch):
    calls = []
    evaluate = grpo_stage.GRPOStage.evaluate
    monkeypatch.setattr(
        grpo_stage.GRPOStage, "evaluate", lambda self, state, step: calls.append(step) or evaluate(self, state, step)
    )
    config = toy_grpo.config(edit=toy_grpo.stage(), t2i=toy_grpo.stage())
    loop.run(config, tmp_path, load=toy_grpo.load, save=toy_grpo.save, mesh=make_mesh(jax.devices()[:1]))
    records = read_evaluations(tmp_path)
    assert calls == [0, 3, 3] and [(r["stage"], r["step"]) for r in records][2] == ("t2i", 0)
    assert records[2]["scores"] == records[1]["scores"] and records[2]["metrics"] == records[1]["metrics"]
    assert records[3]["scores"] != records[2]["scores"]


def test_two_stages_stopped_within_each_end_with_the_same_bits(tmp_path):
    """The second stage continues the first one's LoRA, so that has to survive as well."""
    whole = run(tmp_path / "whole")
    for calls in (2, 3):  # inside the first stage; then inside the second
        Brightness.trouble = toy_grpo.stop_at_call(calls)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "parts")
        assert stop.value.code == 143
    Brightness.trouble = None
    parts = run(tmp_path / "parts")
    with np.load(whole / "params.npz") as a, np.load(parts / "params.npz") as b:
        assert set(a.files) == set(b.files) and not any("lora" in name for name in a.files)
        assert all(np.array_equal(a[name], b[name]) for name in a.files)
    assert read_evaluations(tmp_path / "whole") == read_evaluations(tmp_path / "parts")
    rewards = [
        [row.get("reward") for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")
    ]
    assert rewards[0] == rewards[1]
    assert "| edit | toy/brightness |" in (tmp_path / "whole/report.md").read_text()
    for name in ("edit", "t2i"):
        assert (tmp_path / "whole/stages" / name / "pytorch_lora_weights.safetensors").exists()


def test_a_stage_that_cannot_work_is_refused_before_any_work(tmp_path):
    def sentence(**fields):
        with pytest.raises(ConfigError) as error:
            loop.run(toy_grpo.config(edit=toy_grpo.stage(**fields)), tmp_path / "run", load=toy_grpo.load)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
        return str(error.value)

    assert "group_size" in sentence(grpo={"group_size": 1})
    assert "'brightnes'" in sentence(rewards={"brightnes": {"weight": 1.0}})
    assert "no reward" in sentence(rewards={})
    assert "'toi'" in sentence(source={"kind": "toi"})
    assert "cannot be split" in sentence(num_prompts=3, grpo={"updates_per_rollout": 5})
    assert "'sampels'" in sentence(evaluations={"x": {"sampels": 3}})


DEVICES = """
import sys, jax, numpy as np
sys.path.insert(0, {folder!r})
import toy_grpo
from pathlib import Path
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training import grpo_stage
from unipic2_jax.training.stage import StageContext

# A large epsilon keeps Adam from turning rounding errors of gradients near zero into whole steps.
optimizer = {{"lr": 0.3, "eps": 0.1}}
config = toy_grpo.config(edit=toy_grpo.stage(edit=True, evaluations={{}}, num_prompts=8, optimizer=optimizer)).stages.edit
found = []
for count in (1, 8):
    mesh = make_mesh(jax.devices()[:count])
    stage = grpo_stage.GRPOStage(config, toy_grpo.load(mesh=mesh), StageContext("edit", 0, 0, mesh, Path("."), log=str))
    state = stage.init()
    for step in range(2):
        state, metrics = stage.step(state, step)
    found.append((jax.device_get(state.lora), metrics))
    assert len(jax.tree.leaves(state)[0].sharding.device_set) == count
# The text stream ends in the last block, where its query projection has no effect and its LoRA stays 0.
for one, eight in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0])):
    difference = np.linalg.norm(one - eight)
    assert difference <= 2e-3 * np.linalg.norm(one), (one.shape, difference, np.linalg.norm(one))
assert np.linalg.norm(found[0][0]["blocks"]["attn"]["to_q"]["b"]) > 0
for name in ("loss", "reward", "kl", "ratio_mean"):
    np.testing.assert_allclose(found[0][1][name], found[1][1][name], rtol=1e-3, atol=1e-5)
print("equal", found[0][1]["reward"])
"""


def test_eight_devices_do_what_one_does():
    script = DEVICES.format(folder=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=eight_devices.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0 and done.stdout.startswith("equal"), done.stderr[-2000:]


def test_a_group_may_share_its_first_noise(stage):
    key = jax.random.key(0)
    groups = np.asarray(stage._draw_noise(key)).reshape(stage.config.num_prompts, stage.grpo.group_size, -1)
    assert (groups[:, 0] != groups[:, 1]).any(axis=-1).all()
    stage.config.same_latent = True
    try:
        groups = np.asarray(stage._draw_noise(key)).reshape(groups.shape)
    finally:
        stage.config.same_latent = False
    assert (groups == groups[:, :1]).all() and (groups[0] != groups[1]).any()


def test_sharing_a_group_s_beginning_changes_nothing_but_the_time(tmp_path, monkeypatch):
    window = {"num_steps": 4, "window": {"size": 1, "low": 0, "high": 3}, "kl_beta": 0.5}
    config = toy_grpo.config(edit=toy_grpo.stage(edit=True, same_latent=True, grpo=window)).stages.edit
    mesh = make_mesh(jax.devices()[:1])
    context = StageContext("edit", 0, 0, mesh, tmp_path)

    def run():
        stage = grpo_stage.GRPOStage(config, toy_grpo.load(mesh=mesh), context)
        assert stage.shared and stage.shared_update
        return stage.init().lora, *stage.step(stage.init(), 0)

    stage_start, state, metrics = run()
    for module in ("training.grpo_stage", "rl.update"):
        monkeypatch.setattr(f"unipic2_jax.{module}.once_per_group", lambda policy, groups: policy)
    _, plain_state, plain = run()
    # Rounding may turn a pixel, and with it a reward, by one of 255.
    same = ("reward", "loss", "kl", "ratio_max", "gradient_norm")
    np.testing.assert_allclose([metrics[k] for k in same], [plain[k] for k in same], rtol=0.01, atol=1e-5)
    assert metrics["log_prob_difference_max"] < 1e-5 and metrics["gradient_norm"] > 0
    changes, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.lora)]) for s in (state, plain_state))
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(stage_start)])
    changes, want = changes - start, want - start
    assert changes @ want > 0.99 * np.linalg.norm(changes) * np.linalg.norm(want) > 0
