"""Flow and autoencoder stages on a toy: they learn, they touch only what they should, they are functions of their step."""

import dataclasses

import jax
import numpy as np
import pytest
import toy_grpo

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.examples import EXAMPLES, EndlessExamples, Example, make_examples
from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.flow.timesteps import TimestepSampling
from unipic2_jax.models.lora import count_matrices, merge_lora
from unipic2_jax.models.sd3.lora_file import load_lora
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training.config import make_stage
from unipic2_jax.training.stage import StageContext
from unipic2_jax.training.stages.autoencoder import AutoencoderStage
from unipic2_jax.training.stages.flow import FlowStage
from unipic2_jax.weights import table


class ToyExamples(EndlessExamples):
    """Pictures of one grey value, which the caption's letter tells; an edit's reference is the negative."""

    def __init__(self, seed=0, task="t2i"):
        super().__init__(task, toy_grpo.SIZE, 1)
        self.seed, self.task = seed, task

    def example(self, index):
        letter = int(np.random.default_rng([self.seed, index]).integers(8))
        image = np.full((toy_grpo.SIZE, toy_grpo.SIZE, 3), 20 + 30 * letter, np.uint8)
        return Example(image, "abcdefgh"[letter] * 3, (255 - image,) if self.task == "edit" else ())


EXAMPLES["toy"] = ToyExamples


def make(kind, tmp_path, devices=1, **fields):
    values = {"kind": kind, "steps": 40, "data": {"kind": "toy"}, "batch_size": 8, **fields}
    config = make_stage(values)
    mesh = make_mesh(jax.devices()[:devices])
    bundle = toy_grpo.load(mesh=mesh)
    if kind == "autoencoder":
        bundle = dataclasses.replace(bundle, params={**bundle.params})
    cls = {"flow": FlowStage, "autoencoder": AutoencoderStage}[kind]
    cls.check(config, mesh)
    return cls(config, bundle, StageContext(kind, 0, 0, mesh, tmp_path))


def train(stage, steps):
    state, losses = stage.init(), []
    for step in range(steps):
        state, metrics = stage.step(state, step)
        losses.append(float(metrics["loss"]))
    return state, losses


def test_noise_levels_have_the_shift_of_the_models_scheduler(tmp_path):
    mesh, said = make_mesh(jax.devices()[:1]), []
    bundle = dataclasses.replace(toy_grpo.load(mesh=mesh), scheduler=FlowMatchConfig(shift=3.0))

    def sampling(**timesteps):
        config = make_stage({"kind": "flow", "data": {"kind": "toy"}, "batch_size": 8, "timesteps": timesteps})
        FlowStage.check(config, mesh)
        context = StageContext("kontext", 0, 0, mesh, tmp_path, log=said.append)
        return FlowStage(config, bundle, context).flow_step.sampling

    assert sampling() == TimestepSampling("logit_normal", 0.0, 1.0, shift=3.0)
    assert said == ["kontext: noise levels have the shift of the model's scheduler, 3."]
    assert sampling(kind="uniform", shift=1) == TimestepSampling("uniform", shift=1.0) and len(said) == 1
    with pytest.raises(ValueError, match="has shift 0"):
        sampling(shift=0.0)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    optimizer = {"lr": 3e-3, "trainable": "^(transformer|conditioner)/", "weight_decay": 0.0}
    return make("flow", tmp_path_factory.mktemp("flow"), optimizer=optimizer, pool=256, ema_decay=0.9)


def test_flow_learns_alternates_and_leaves_the_rest_alone(flow):
    state, losses = train(flow, 40)
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])
    _, first = flow.step(flow.init(), 0)
    _, second = flow.step(flow.init(), 1)
    assert "loss_t2i" in first and "loss_edit" in second and "loss_edit" not in first
    finished, started = flow.finish(state).params, flow.bundle.params
    same = lambda name: all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(finished[name]), jax.tree.leaves(started[name]))
    )
    assert same("vae") and not same("transformer") and not same("conditioner")
    table = lambda params: np.asarray(params["transformer"]["pos_embed"]["pos_embed"])
    assert np.array_equal(table(finished), table(started))
    assert jax.tree.structure(finished) == jax.tree.structure(started)


def test_flow_keeps_the_moving_average(flow):
    state, _ = train(flow, 3)
    kept = flow.finish(state).params["conditioner"]["table"]
    assert np.array_equal(kept, state.ema["conditioner"]["table"])
    assert not np.array_equal(kept, state.trained["conditioner"]["table"])


def test_a_flow_step_is_a_function_of_state_and_number(flow):
    (one, a), (two, b) = flow.step(flow.init(), 5), flow.step(flow.init(), 5)
    timed = ("seconds_data", "model_tflops_per_second")
    a, b = ({name: value for name, value in metrics.items() if name not in timed} for metrics in (a, b))
    assert a == b and all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two)))
    assert flow.step(flow.init(), 7)[1]["loss"] != a["loss"]


def test_a_flow_stage_may_train_a_lora(tmp_path):
    """It learns, nothing else changes, and what is kept, exported, and started from again is one update."""
    lora = {"rank": 4, "alpha": 6.0, "targets": ("attn.to_q", "ff.net.2", "proj_out")}
    fields = {"pool": 256, "ema_decay": 0.9, "optimizer": {"lr": 2e-2, "weight_decay": 0.0}}
    stage = make("flow", tmp_path, lora=lora, **fields)
    state, losses = train(stage, 30)
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    assert set(state.trained) == {"lora"} and count_matrices(state.trained["lora"]) == 2 + 2 + 1
    before, after = (
        table.flatten(jax.device_get(params)) for params in (stage.bundle.params, stage.finish(state).params)
    )
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    adapted = {path.removesuffix("/a") for path in table.flatten(state.trained["lora"]) if path.endswith("/a")}
    assert before.keys() == after.keys() and changed == {f"transformer/{path}/kernel" for path in adapted}

    stage.export(state, tmp_path)
    config, own = stage.bundle.transformer.config, stage.bundle.params["transformer"]
    merged = table.flatten(jax.device_get(merge_lora(own, load_lora(tmp_path, config))))
    for path in merged:
        np.testing.assert_allclose(merged[path], after[f"transformer/{path}"], rtol=0, atol=1e-6)

    # From the file, at another alpha and a larger rank, the next stage starts with the same weights.
    again = {**lora, "rank": 6, "alpha": 3.0, "init": str(tmp_path), "targets": (*lora["targets"], "attn.to_k")}
    stage = make("flow", tmp_path, lora=again, **fields)
    state = stage.init()
    started = table.flatten(jax.device_get(stage.finish(state).params["transformer"]))
    for path in merged:
        np.testing.assert_allclose(started[path], merged[path], rtol=0, atol=1e-6)
    assert all(np.any(leaf) for path, leaf in table.flatten(state.trained["lora"]).items() if path.endswith("/a"))
    for changes, words in (
        ({"targets": ("attn.to_q", "proj_out")}, "adapts .*linear_2, which lora.targets leaves out"),
        ({"rank": 2}, "has rank 4 and lora.rank is 2; make it 4"),
        ({"targets": ("attn.to_qq",)}, "'attn.to_qq' is no layer of the transformer; it has "),
        ({"targets": ("(",)}, "neither a name nor a regex"),
        ({"rank": -1}, "lora.rank is -1"),
        ({"rank": 0}, "lora.rank is 0; give a rank"),
        ({"alpha": 0.0}, "lora.alpha is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            make("flow", tmp_path, lora={**again, **changes}, **fields)
    with pytest.raises(FileNotFoundError, match="no LoRA file or folder"):
        make("flow", tmp_path, lora={**lora, "init": str(tmp_path / "nowhere")}, **fields)
    with pytest.raises(ConfigError, match="the LoRA is all that is trained"):
        make("flow", tmp_path, lora=lora, optimizer={"trainable": "^conditioner/"})
    assert make_stage({"kind": "flow", "lora": None}).lora.rank == 0


@pytest.mark.parametrize("pool", [0, 256])
def test_a_flow_step_moves_nothing_unasked_and_gives_up_the_old_state(tmp_path, pool):
    stage = make("flow", tmp_path, pool=pool)
    state, _ = stage.step(stage.init(), 0)
    state, _ = stage.step(state, 1)  # each task for the first time
    with jax.transfer_guard("disallow"):
        new, _ = stage.step(state, 2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, stage.frozen)))


@pytest.mark.parametrize("pool", [0, 256])
def test_what_a_flow_stage_remembers_is_made_again_the_same(tmp_path, pool):
    """One that begins in the middle computes the bits of one that has seen the steps before."""
    options = {"pool": pool, "caption_dropout": {"t2i": 0.5, "edit": 0.5}, "latents": "sample"}
    whole, later = (make("flow", tmp_path, **options) for _ in range(2))
    state = whole.init()
    for step in range(3):
        state, _ = whole.step(state, step)
    kept = jax.tree.map(np.array, state)
    (one, _), (other, _) = whole.step(state, 3), later.step(later.place(kept), 3)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_without_a_pool_no_example_comes_twice(tmp_path, monkeypatch):
    seen = []

    class Watched(ToyExamples):
        def example(self, index):
            seen.append((self.task, index))
            return super().example(index)

    monkeypatch.setitem(EXAMPLES, "toy", Watched)
    stage = make("flow", tmp_path, loader_threads=0)
    seen.clear()
    for step in range(4):
        stage.loader.batch(step)
    assert len(seen) == len(set(seen)) == 32


def test_autoencoder_learns_and_measures_its_latents(tmp_path):
    stage = make("autoencoder", tmp_path, optimizer={"lr": 1e-2}, measure=32)
    state, losses = train(stage, 30)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    result = stage.evaluate(state, 30)
    assert result["metrics"]["psnr"] > 0 and result["images"]["reconstructions"].size[0] > 0
    bundle = stage.finish(state)
    latents = stage._measure(state)[2]
    config = bundle.vae.config
    assert np.mean((latents - config.shift_factor) * config.scaling_factor) == pytest.approx(0, abs=1e-4)
    assert np.std((latents - config.shift_factor) * config.scaling_factor) == pytest.approx(1, rel=1e-3)
    assert bundle.params["transformer"] is stage.bundle.params["transformer"]


def test_what_a_configuration_must_not_say(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        make("flow", tmp_path, data={"kind": "nowhere"})
    with pytest.raises(ValueError, match="does not take"):
        make_examples({"kind": "toy", "colour": 1}, 0, "t2i")
    with pytest.raises(ValueError, match="task 'video'"):
        make_examples({"kind": "toy"}, 0, "video")
    with pytest.raises(ConfigError, match="tasks is empty"):
        make("flow", tmp_path, tasks=())
    with pytest.raises(ConfigError, match="matches no parameter"):
        make("flow", tmp_path, optimizer={"trainable": "^nothing/"})
    with pytest.raises(ValueError, match="unknown"):
        make("flow", tmp_path, timesteps={"kind": "beta"})
    with pytest.raises(ConfigError, match=r"by a VAE that optimizer\.trainable trains"):
        make("flow", tmp_path, pool=256, optimizer={"trainable": "."})
