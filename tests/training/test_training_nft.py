"""DiffusionNFT as a stage of a run: what it logs, whose weights sample, that it learns, and the same bits after interruptions."""

import jax
import numpy as np
import pytest
import toy_grpo
from toy_grpo import Brightness

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training import loop
from unipic2_jax.training.metrics import read_rows
from unipic2_jax.training.stage import StageContext, stage_class

LOGGED = (
    *(
        "reward",
        "reward_std",
        "reward_brightness",
        "failed",
        "loss",
        "policy_loss",
        "kl",
        "old_difference",
        "old_share",
    ),
    *("gradient_norm", "seconds_rollout", "seconds_reward", "seconds_update", "model_tflops_per_second"),
)


@pytest.fixture(autouse=True)
def no_trouble():
    yield
    Brightness.trouble = None


def nft_stage(**fields):
    """The toy's stage with this algorithm."""
    values = toy_grpo.stage(**{name: value for name, value in fields.items() if name != "nft"})
    del values["grpo"]
    own = {
        "num_steps": 4,
        "group_size": 4,
        "solver": "euler",
        "kl_beta": 0.01,
        "updates_per_rollout": 2,
        "old_rate": 0.1,
    }
    return {**values, "kind": "nft", "nft": {**own, **fields.get("nft", {})}}


def make_stage(tmp_path, **fields):
    config = toy_grpo.config(edit=nft_stage(**fields)).stages.edit
    mesh = make_mesh(jax.devices()[:1])
    return stage_class("nft")(config, toy_grpo.load(mesh=mesh), StageContext("edit", 0, 0, mesh, tmp_path))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp("stage"), edit=True, sampling_batches=2)


def test_a_step_logs_what_it_did(stage):
    state, metrics = stage.step(stage.init(), 0)
    assert set(LOGGED) <= set(metrics) and all(np.isfinite(value) for value in metrics.values())
    assert metrics["non_finite"] == 0 and metrics["gradient_norm"] > 0
    assert int(state.policy.step) == 2 and metrics["old_share"] == pytest.approx(0.2)
    again, _ = stage.step(stage.init(), 0)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again)))


def test_the_old_policy_samples(stage):
    state = stage.init()
    policy = jax.tree.map(lambda x: x + 0.1, state.policy.lora)
    reward = lambda own: stage.step(state._replace(policy=jax.tree.map(np.array, own)), 0)[1]["reward"]
    before = reward(state.policy)
    assert reward(state.policy._replace(lora=policy)) == before
    assert reward(state.policy._replace(old=policy)) != before


def test_it_learns(stage):
    brightness = lambda state: stage.evaluate(state, 0)["metrics"]["toy/brightness"]
    state = stage.init()
    before = brightness(state)  # the same prompts and noise before and after
    for step in range(30):
        state, _ = stage.step(state, step)
    assert brightness(state) > before + 0.02


def test_runs_of_both_algorithms_stopped_within_each_end_with_the_same_bits(tmp_path):
    """A stage of GRPO goes on with the LoRA that one of NFT has left, and each is stopped in a step."""
    stages = {"edit": nft_stage(edit=True, sampling_batches=2), "t2i": toy_grpo.stage(reference="base")}
    config = toy_grpo.config(**stages)
    start = lambda name: loop.run(
        config, tmp_path / name, load=toy_grpo.load, save=toy_grpo.save, mesh=make_mesh(jax.devices()[:1])
    )
    whole = start("whole")
    for calls in (4, 5):
        Brightness.trouble = toy_grpo.stop_at_call(calls)
        with pytest.raises(SystemExit):
            start("parts")
    Brightness.trouble = None
    parts = start("parts")
    with np.load(whole / "params.npz") as a, np.load(parts / "params.npz") as b:
        assert a.files == b.files and all(a[name].tobytes() == b[name].tobytes() for name in a.files)
    timed = ("seconds", "samples_per_second", "model_tflops")
    rows = [
        [
            {k: v for k, v in row.items() if not k.startswith(timed)}
            for row in read_rows(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and {"old_share", "ratio_mean"} <= {name for row in rows[0] for name in row}
    for name in ("edit", "t2i"):
        files = [tmp_path / run / "stages" / name / "pytorch_lora_weights.safetensors" for run in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_work_is_refused():
    mesh = make_mesh(jax.devices()[:1])

    def sentence(**fields):
        with pytest.raises((ConfigError, ValueError)) as caught:
            stage_class("nft").check(toy_grpo.config(edit=nft_stage(**fields)).stages.edit, mesh)
        return str(caught.value)

    assert "from which an ODE makes one picture" in sentence(same_latent=True)
    assert "samples and trains without guidance" in sentence(nft={"guidance_scale": 2.0})
    assert "choose num_prompts, nft.updates_per_rollout and nft.micro_batch" in sentence(nft={"updates_per_rollout": 5})
    assert "changes nothing at nft.guidance_scale 1" in sentence(negative_prompt="blur")
