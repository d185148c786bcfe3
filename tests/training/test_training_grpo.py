"""GRPO as a stage of a run: what it logs, that it learns, failed rewards, several stages, resume, devices."""

import copy
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import eight_devices
import jax
import numpy as np
import pytest
import toy_grpo
from PIL import Image
from toy_grpo import Brightness

from unipic2_jax.core.errors import ConfigError, TrainingPaused
from unipic2_jax.evaluation.evaluator import check_evaluation, make_evaluators
from unipic2_jax.models import sampling
from unipic2_jax.models.lora import merge_lora, scaled
from unipic2_jax.models.sd3.lora import init_lora
from unipic2_jax.models.sd3.lora_writing import save_lora
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.pictures import resize as pictures
from unipic2_jax.rewards.base import RewardError
from unipic2_jax.rl.algorithm import sampling_batches
from unipic2_jax.training import loop
from unipic2_jax.training.metrics import read_evaluations, read_rows
from unipic2_jax.training.stage import StageContext, stage_class
from unipic2_jax.weights import table

GRPOStage = stage_class("grpo")
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
    return GRPOStage(config, toy_grpo.load(mesh=mesh), context)


def test_a_step_logs_what_it_did_and_is_on_policy(stage):
    state, metrics = stage.step(stage.init(), 0)
    assert set(LOGGED) <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["log_prob_difference"] < 1e-5 and metrics["failed"] == 0
    assert metrics["reward"] == pytest.approx(metrics["reward_brightness"])
    assert int(state.policy.step) == 2  # two updates per rollout
    again, _ = stage.step(stage.init(), 0)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again)))


def test_a_step_moves_nothing_unasked_and_gives_up_the_old_state(stage):
    state, _ = stage.step(stage.init(), 0)
    with jax.transfer_guard("disallow"):
        new, _ = stage.step(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.policy))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, stage.params)))


def test_failed_rewards_are_left_out_and_counted(stage):
    Brightness.trouble = lambda values: np.where(np.arange(len(values)) % 4 == 0, np.nan, values)
    _, metrics = stage.step(stage.init(), 0)
    assert metrics["failed"] == metrics["reward_brightness_failed"] == 4
    assert np.isfinite(metrics["reward"]) and metrics["gradient_norm"] > 0


def test_a_reward_that_always_fails_stops_the_run(stage):
    Brightness.trouble = lambda values: np.full_like(values, np.nan)
    state = stage.init()
    after, metrics = stage.step(state, 0)
    assert after.policy is state.policy and "reward" not in metrics and metrics["failed"] == 16
    assert after.failures.tolist() == [-1, 16]
    with pytest.raises(
        loop.TrainingError, match=r"100% of the samples of stage 'edit' could not be scored in the 2 steps up to step 1"
    ):
        stage.step(after, 1)
    # As soon as scores come the run goes on, whatever its window holds.
    Brightness.trouble = None
    assert stage.step(after, 1)[0].failures.tolist() == [16, 0]


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
    # The first stage is stopped while one of two batches is being scored.
    first = toy_grpo.stage(edit=True, sampling_batches=2)
    config = toy_grpo.config(edit=first, t2i=toy_grpo.stage(reference="base"))
    return loop.run(config, workdir, load=toy_grpo.load, save=toy_grpo.save, mesh=make_mesh(jax.devices()[:1]))


def test_without_a_lora_all_of_the_transformer_is_reinforced(tmp_path):
    """The reference stays what the stage began with; what it ends with are other weights and no LoRA file."""
    config = toy_grpo.config(
        edit=toy_grpo.stage(lora=None, optimizer={"lr": 3e-3}, grpo={"updates_per_rollout": 1})
    ).stages.edit
    mesh = make_mesh(jax.devices()[:1])
    context = StageContext("edit", 0, 0, mesh, tmp_path)
    stage = GRPOStage(config, toy_grpo.load(mesh=mesh), context)
    state, first = stage.step(stage.init(), 0)
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-3) and first["log_prob_difference"] < 1e-5
    for step in (1, 2):
        state, later = stage.step(state, step)
    assert later["kl"] > first["kl"] >= 0 and first["reward"] < later["reward"]
    before, after = (table.flatten(jax.device_get(b.params)) for b in (stage.bundle, stage.finish(state)))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    others = {path for path in before if not path.startswith("transformer/")} | {"transformer/pos_embed/pos_embed"}
    assert before.keys() == after.keys() and not changed & others
    assert len(changed) > 0.8 * (len(before) - len(others))
    scores = stage.evaluate(state, 3)["metrics"]
    assert scores != stage.evaluate(stage.init(), 0)["metrics"]
    stage.export(state, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ConfigError, match="reference='base' continues the LoRA of the stage before"):
        wrong = toy_grpo.config(edit=toy_grpo.stage(lora=None, reference="base")).stages.edit
        GRPOStage.check(wrong, mesh)


def test_reinforcement_goes_on_from_a_lora_file(tmp_path):
    """It begins at the file's weights, and the KL is measured from them."""
    mesh, bundle = make_mesh(jax.devices()[:1]), toy_grpo.load(mesh=make_mesh(jax.devices()[:1]))
    tree = init_lora(jax.random.key(1), bundle.params["transformer"], 2)
    tree = jax.tree.map(lambda x: x + 0.05, tree)
    save_lora(tmp_path, jax.device_get(tree), 3.0, bundle.transformer.config)
    lora = {"rank": 4, "alpha": 8.0, "init": str(tmp_path)}
    config = toy_grpo.config(edit=toy_grpo.stage(lora=lora, grpo={"updates_per_rollout": 1})).stages.edit
    stage = GRPOStage(config, bundle, StageContext("edit", 0, 0, mesh, tmp_path))
    state = stage.init()
    began = table.flatten(jax.device_get(stage.finish(state).params["transformer"]))
    wanted = table.flatten(jax.device_get(merge_lora(bundle.params["transformer"], scaled(tree, 1.5))))
    for path in wanted:
        np.testing.assert_allclose(began[path], wanted[path], rtol=0, atol=1e-6)
    state, first = stage.step(state, 0)
    assert first["kl"] == pytest.approx(0, abs=1e-9) and first["ratio_mean"] == pytest.approx(1, abs=1e-3)
    assert stage.step(state, 1)[1]["kl"] > 1e-9


def test_a_stage_is_not_measured_again_where_the_one_before_ended(tmp_path, monkeypatch):
    calls = []
    evaluate = GRPOStage.evaluate
    monkeypatch.setattr(
        GRPOStage, "evaluate", lambda self, state, step: calls.append(step) or evaluate(self, state, step)
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
    for calls in (1, 6):  # inside the first stage; then inside the second
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
    assert "cannot be sampled in 3 batches" in sentence(sampling_batches=3)
    assert "error_budget is 2" in sentence(error_budget=2.0)
    assert "'toi'" in sentence(source={"kind": "toi"})
    assert "cannot be split" in sentence(num_prompts=3, grpo={"updates_per_rollout": 5})
    assert "'sampels'" in sentence(evaluations={"x": {"sampels": 3}})
    assert "evaluations.x has no source; give it one" in sentence(evaluations={"x": {"rewards": {"brightness": {}}}})
    nowhere = {"source": {"kind": "jsonl", "path": "heldout.jsonl"}}
    assert "evaluations.x: The prompt file heldout.jsonl does not exist" in sentence(evaluations={"x": nowhere})
    assert "evaluations.x has -1 prompts" in sentence(evaluations={"x": {**nowhere, "num_prompts": -1}})
    unguided = {"negative_prompt": "blur", "grpo": {"guidance_scale": 1.0}}
    assert "negative_prompt changes nothing at grpo.guidance_scale 1" in sentence(**unguided)
    unguided = {**nowhere, "negative_prompt": "blur", "guidance_scale": 1.0}
    assert "evaluations.x.negative_prompt changes nothing" in sentence(evaluations={"x": unguided})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a cat on a mat"}\n')
    unscorable = {"source": {"kind": "jsonl", "path": str(prompts)}, "rewards": {"shapes_t2i": {}}}
    wanted = f"rewards.shapes_t2i: Line 1 of {prompts}: The prompt 'a cat on a mat' says nothing of what to find"
    assert wanted in sentence(**unscorable) and wanted in sentence(evaluations={"x": unscorable})


def test_an_evaluation_without_held_out_prompts_is_left_out(tmp_path):
    said = []
    context = StageContext("edit", 0, 0, make_mesh(jax.devices()[:1]), tmp_path, log=said.append)
    evaluations = {
        "edit": {"source": {"kind": "jsonl", "path": "", "task": "edit"}},
        "unwanted": {"source": {"kind": "jsonl", "path": "there.jsonl"}, "num_prompts": 0},
    }
    for name, fields in evaluations.items():
        check_evaluation(name, fields)
    assert make_evaluators(evaluations, toy_grpo.load(), *context.evaluates) == []
    (sentence,) = said  # what has no prompts on purpose needs no word
    assert sentence.startswith("edit: 'edit' is not evaluated") and "\n" not in sentence
    assert sentence.endswith("--config.stages.edit.evaluations.edit.source.path=FILE.")


def test_an_evaluation_asks_each_prompt_of_a_file_once(tmp_path):
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "bcd"}\n{"prompt": "cde"}\n')
    fields = toy_grpo.stage()["evaluations"]["toy"]
    fields |= {"source": {"kind": "jsonl", "path": str(tmp_path / "heldout.jsonl")}, "num_prompts": 256, "samples": 2}
    context = StageContext("edit", 0, 0, make_mesh(jax.devices()[:1]), tmp_path, log=print)
    bundle = toy_grpo.load(mesh=context.mesh)
    (evaluator,) = make_evaluators({"toy": fields}, bundle, *context.evaluates)
    found = evaluator.run(bundle.params)
    assert found["scores"]["toy/brightness"].shape == (3, 2)
    assert {record.prompt for record in evaluator.records} == {"abc", "bcd", "cde"}


DEVICES = """
import sys, jax, numpy as np
sys.path.insert(0, {folder!r})
import toy_grpo
from pathlib import Path
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training.stage import StageContext, stage_class

# A large epsilon keeps Adam from turning rounding errors of gradients near zero into whole steps.
optimizer = {{"lr": 0.3, "eps": 0.1}}
config = toy_grpo.config(edit=toy_grpo.stage(edit=True, evaluations={{}}, num_prompts=8, optimizer=optimizer)).stages.edit
found = []
for count in (1, 8):
    mesh = make_mesh(jax.devices()[:count])
    stage = stage_class("grpo")(config, toy_grpo.load(mesh=mesh), StageContext("edit", 0, 0, mesh, Path("."), log=str))
    state = stage.init()
    for step in range(2):
        state, metrics = stage.step(state, step)
    found.append((jax.device_get(state.policy.lora), metrics))
    assert len(jax.tree.leaves(state.policy)[0].sharding.device_set) == count
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
    script = DEVICES.format(folder=str(Path(__file__).parents[1] / "support"))
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
    sampler = stage.sampler
    groups = np.asarray(sampler.draw_noise(key)).reshape(sampler.layout.prompts, sampler.layout.group_size, -1)
    assert (groups[:, 0] != groups[:, 1]).any(axis=-1).all()
    shared = copy.copy(sampler)
    shared.layout = dataclasses.replace(sampler.layout, same_latent=True)
    groups = np.asarray(shared._draw_noise(key)).reshape(groups.shape)
    assert (groups == groups[:, :1]).all() and (groups[0] != groups[1]).any()


def test_sharing_a_group_s_beginning_changes_nothing_but_the_time(tmp_path, monkeypatch):
    window = {"num_steps": 4, "window": {"size": 1, "low": 0, "high": 3}, "kl_beta": 0.5}
    config = toy_grpo.config(edit=toy_grpo.stage(edit=True, same_latent=True, grpo=window)).stages.edit
    mesh = make_mesh(jax.devices()[:1])
    context = StageContext("edit", 0, 0, mesh, tmp_path)

    def run():
        stage = GRPOStage(config, toy_grpo.load(mesh=mesh), context)
        assert stage.algorithm.shares_beginning and stage.algorithm.shares_update
        return stage.init().policy.lora, *stage.step(stage.init(), 0)

    stage_start, state, metrics = run()
    monkeypatch.setattr("unipic2_jax.rl.grpo.once_per_group", lambda policy, groups: policy)
    _, plain_state, plain = run()
    # Rounding may turn a pixel, and with it a reward, by one of 255.
    same = ("reward", "loss", "kl", "ratio_max", "gradient_norm")
    np.testing.assert_allclose([metrics[k] for k in same], [plain[k] for k in same], rtol=0.01, atol=1e-5)
    assert metrics["log_prob_difference_max"] < 1e-5 and metrics["gradient_norm"] > 0
    changes, want = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.policy.lora)]) for s in (state, plain_state)
    )
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(stage_start)])
    changes, want = changes - start, want - start
    assert changes @ want > 0.99 * np.linalg.norm(changes) * np.linalg.norm(want) > 0


def make_stage(tmp_path, **fields):
    config = toy_grpo.config(edit=toy_grpo.stage(edit=True, evaluations={}, **fields)).stages.edit
    mesh = make_mesh(jax.devices()[:1])
    log = []
    stage = GRPOStage(config, toy_grpo.load(mesh=mesh), StageContext("edit", 0, 0, mesh, tmp_path, log=log.append))
    return stage, log


def test_one_batch_is_scored_while_the_next_is_sampled_and_all_share_a_window(tmp_path):
    window = {"window": {"size": 1, "low": 0, "high": 3}}
    stage, _ = make_stage(tmp_path, sampling_batches=2, audit_every=2, grpo=window)
    events, sample = [], stage.sampler.sample
    stage.sampler.sample = lambda *given: (events.append(int(given[2].part)), sample(*given))[1]

    def trouble(values):
        events.append("scored")
        return values

    Brightness.trouble = trouble
    joined = []
    join = stage.sampler.join

    def look(parts):
        joined.append([part[0] for part in jax.device_get(parts)])
        return join(parts)

    look.eval_shape = join.eval_shape
    stage.sampler.join = look
    state, metrics = stage.step(stage.init(), 0)
    assert events.count("scored") == 2 and [e for e in events if e != "scored"] == [0, 1]
    first, second = joined[0]
    assert first.steps == second.steps and first.latents.shape[1] == 8
    assert (first.latents[0] != second.latents[0]).any()
    assert metrics["log_prob_difference"] < 1e-5 and metrics["gradient_norm"] > 0
    # The pictures and scores of the step are kept: 16 samples, 4 sources.
    folder = tmp_path / "audit/edit/000000"
    rows = [json.loads(line) for name in ("00000", "00008") for line in (folder / f"scores_{name}.jsonl").open()]
    assert [row["image"] for row in rows] == [f"{index:05d}.png" for index in range(16)]
    kept = [np.asarray(Image.open(folder / row["image"])).mean() / 255 for row in rows]
    np.testing.assert_allclose([row["rewards"]["brightness"]["score"] for row in rows], kept)
    assert len({row["source"] for row in rows}) == 4 and all((folder / row["source"]).exists() for row in rows)
    assert metrics["reward"] == pytest.approx(np.mean(kept))
    stage.step(state, 1)
    assert [path.name for path in folder.parent.iterdir()] == ["000000"]


def test_results_do_not_depend_on_how_many_are_sampled_at_once(tmp_path):
    """References and all noise are those of a step sampled whole; what differs is the rounding of other batch sizes."""
    window = {"window": {"size": 2, "low": 0, "high": 3}}
    found = []
    for parts in (1, 2, 4):
        stage, _ = make_stage(tmp_path, sampling_batches=parts, grpo=window)
        together, kept = stage.sampler.together, []
        stage.sampler.together = lambda sampled, together=together, kept=kept: kept.append(together(sampled)) or kept[0]
        state, metrics = stage.step(stage.init(), 0)
        rollout, inputs = kept[0]
        found.append((rollout, inputs, state.policy.lora, {k: metrics[k] for k in ("reward", "loss", "gradient_norm")}))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0][0].latents[0], other[0].latents[0])
        close = lambda a, b, atol: jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol), a, b
        )
        for part, atol in enumerate((1e-4, 1e-5, 2e-3, 1e-4)):  # Adam makes whole steps of the smallest gradients
            close(found[0][part], other[part], atol)


def test_a_step_is_sampled_in_parts_that_keep_devices_busy():
    assert [sampling_batches(16, 16, devices, 1) for devices in (1, 8, 16, 32, 64)] == [4, 4, 2, 1, 1]
    assert (
        sampling_batches(48, 24, 8, 1) == 4
        and sampling_batches(14, 16, 1, 1) == 2
        and sampling_batches(7, 8, 1, 1) == 1
    )
    assert sampling_batches(16, 16, 16, 8) == 2 and sampling_batches(12, 64, 8, 8) == 1  # whole groups in each process


def test_a_timeline_tells_what_waited_for_what(tmp_path):
    stage, _ = make_stage(tmp_path, sampling_batches=2)
    stage.step(stage.init(), 0)
    spans = {name: (begun, ended) for name, begun, ended in stage.context.timeline.spans}
    assert spans.keys() == {
        *(f"{what} {part}" for what in ("read", "begin", "sample", "decode", "score brightness") for part in (0, 1)),
        *("wait for scores", "compile", "update"),
    }
    assert all(0 <= begun <= ended for begun, ended in spans.values())
    order = ["read 0", "begin 0", "read 1", "sample 0", "decode 0", "begin 1", "sample 1", "decode 1"]
    order += ["wait for scores", "compile", "update"]
    assert all(spans[a][1] <= spans[b][0] + 2e-3 for a, b in itertools.pairwise(order))
    assert spans["decode 0"][1] <= spans["score brightness 0"][0] + 2e-3


def test_what_leaves_the_device_is_rounded_there_as_numpy_did_it(tmp_path):
    stage, _ = make_stage(tmp_path)
    vae, params = stage.bundle.vae, stage.params["vae"]
    latents = 4 * jax.random.normal(jax.random.key(0), (3, 8, 8, vae.config.latent_channels))
    floats = jax.jit(lambda params, x: sampling.decode_latents(vae, params, x))(params, latents)
    made = jax.jit(lambda params, x: sampling.decode_pictures(vae, params, x))(params, latents)
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, pictures.to_uint8(np.asarray(floats)))
    # At and beside every place where a level ends, and where none is left.
    ends = (np.arange(-3, 260) + np.float32(0.5)) / np.float32(255) * 2 - np.float32(1)
    edges = np.concatenate([np.nextafter(ends, np.float32(-9)), ends, np.nextafter(ends, np.float32(9))]).astype("f")
    np.testing.assert_array_equal(jax.jit(pictures.to_uint8)(edges), pictures.to_uint8(edges))


def test_sampler_and_trainer_that_differ_are_told_of_once(tmp_path):
    grpo = {"old_log_probs": "sampler", "guard": True, "clip_range": 1e-12}
    stage, log = make_stage(tmp_path, sampling_batches=2, grpo=grpo)
    state = stage.init()
    for step in range(2):
        state, metrics = stage.step(state, step)
        assert metrics["log_prob_difference"] > 1e-12 and metrics["clip_fraction"] > 0
    told = [line for line in log if "log_prob_difference" in line]
    assert len(told) == 1 and told[0].startswith("edit, step 0: log_prob_difference between sampler and trainer is ")
    assert "above grpo.clip_range = 1e-12; " in told[0] and "set grpo.old_log_probs='trainer'" in told[0]


def test_the_old_policys_pass_is_work_of_the_algorithm(stage):
    passes = stage.algorithm.passes()
    config = dataclasses.replace(stage.algorithm.config, old_log_probs="sampler")
    without = dataclasses.replace(stage.algorithm, config=config).passes()
    # Of two updates the second needs one more pass beside the reference's.
    assert without == dataclasses.replace(passes, watched=passes.trained)
    assert passes.watched == passes.trained + passes.trained // 2


def test_rewards_can_be_normalised_belong_to_datasets_and_only_be_watched(tmp_path):
    rewards = {
        "brightness": {"weight": 1.0, "normalize": "group", "datasets": ("even",)},
        "odd": {"kind": "brightness", "weight": 2.0, "datasets": ("odd",)},
        "watched": {"kind": "brightness", "weight": 0.0},
    }
    stage, _ = make_stage(tmp_path, rewards=rewards)
    batch = stage.source.batch
    tagged = lambda record: dataclasses.replace(record, metadata={"dataset": record.metadata["tag"]})
    stage.source.batch = lambda step, count: [tagged(record) for record in batch(step, count)]
    _, metrics = stage.step(stage.init(), 0)
    assert metrics["failed"] == 0 and metrics["reward_watched"] > 0
    # Half of the samples have mean 0; the other half twice their brightness.
    assert metrics["reward"] == pytest.approx(metrics["reward_odd"], abs=1e-9)


def test_a_run_over_its_error_budget_is_saved_and_goes_on_later(tmp_path):
    config = toy_grpo.config(edit=toy_grpo.stage(evaluations={}, steps=4, save_every=100, error_window=1))
    start = lambda folder: loop.run(
        config, folder, load=toy_grpo.load, save=toy_grpo.save, mesh=make_mesh(jax.devices()[:1])
    )
    calls = iter(range(100))
    Brightness.trouble = lambda values: np.where(next(calls) >= 2, np.nan, values)
    with pytest.raises(TrainingPaused, match=r"100% of the samples of stage 'edit' .* up to step 2; repair the reward"):
        start(tmp_path / "parts")
    Brightness.trouble = None
    found = loop.Checkpoints(tmp_path / "parts/checkpoints", 3)
    assert found.steps() == [2]
    parts, whole = start(tmp_path / "parts"), start(tmp_path / "whole")
    with np.load(whole / "params.npz") as a, np.load(parts / "params.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


def test_a_run_that_is_killed_within_a_failing_window_stops_at_the_step_it_would_have(tmp_path):
    """The window is in the state: three steps of four fail, in which a run that forgot it would go on to its end."""
    fields = {"steps": 6, "save_every": 1, "error_window": 4, "error_budget": 0.7, "evaluations": {}}
    config = toy_grpo.config(edit=toy_grpo.stage(**fields))
    start = lambda name: loop.run(
        config, tmp_path / name, load=toy_grpo.load, save=toy_grpo.save, mesh=make_mesh(jax.devices()[:1])
    )
    step, failing = GRPOStage.step, {1, 2, 3, 4, 5}

    def stepping(stop_at, stage, state, number):
        broken = lambda values: np.full_like(values, np.nan) if number in failing else values
        stop = toy_grpo.stop_at_call(0)
        Brightness.trouble = (lambda values: stop(broken(values))) if number == stop_at else broken
        return step(stage, state, number)

    def run(name, stop_at=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GRPOStage, "step", lambda *given: stepping(stop_at, *given))
            start(name)

    message = r"75% of the samples of stage 'edit' could not be scored in the 4 steps up to step 3"
    with pytest.raises(TrainingPaused, match=message):
        run("whole")
    with pytest.raises(SystemExit):
        run("parts", stop_at=2)
    with pytest.raises(TrainingPaused, match=message):
        run("parts")
    # Started again before anything is repaired, it stops where it is; afterwards it goes on, whatever came before.
    with pytest.raises(TrainingPaused, match=message):
        run("parts")
    failing.clear()
    run("parts")
    run("whole")
    with np.load(tmp_path / "whole/export/params.npz") as a, np.load(tmp_path / "parts/export/params.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


def test_a_checkpoint_from_before_the_window_was_in_it_can_be_read(stage):
    state = stage.init()
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]
    assert stage.saved_as(state, names) is state is stage.restored(state)
    before = [name.removeprefix("policy/") for name in names if name != "failures"]
    older = stage.saved_as(state, before)
    assert older is state.policy and {name.split("/")[0] for name in before} == {*type(older)._fields}
    restored = stage.restored(older)
    assert restored.policy is older and restored.failures.tolist() == [-1, -1]


def edits(folder, damaged=""):
    """A manifest of four edits, and the fields of a stage that is trained on it."""
    for number, name in enumerate("abcd"):
        Image.new("RGB", (4, 4), (60 * number, 0, 0)).save(folder / f"{name}.png")
    if damaged:
        (folder / f"{damaged}.png").write_bytes((folder / "a.png").read_bytes()[:40])
    rows = (
        {"input_images": [f"{name}.png"], "instruction": f"brighten {name}", "output_image": "no"} for name in "abcd"
    )
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "jsonl", "path": str(folder / "edits.jsonl"), "task": "edit"}
    return toy_grpo.config(edit=toy_grpo.stage(source=source, evaluations={}, steps=3, save_every=100))


def test_a_picture_that_breaks_during_a_run_is_a_counted_failure_also_after_an_interruption(tmp_path):
    config = edits(tmp_path)
    start = lambda folder: loop.run(
        config, folder, load=toy_grpo.load, save=toy_grpo.save, mesh=make_mesh(jax.devices()[:1])
    )

    def losing(values, then=lambda values: values):
        (tmp_path / "b.png").unlink(missing_ok=True)
        return then(values)

    Brightness.trouble = losing
    whole = start(tmp_path / "whole")
    assert [row["failed"] for row in read_rows(tmp_path / "whole/metrics.jsonl") if "failed" in row] == [0, 4, 4]
    edits(tmp_path)
    Brightness.trouble = functools.partial(losing, then=toy_grpo.stop_at_call(1))
    with pytest.raises(SystemExit):
        start(tmp_path / "parts")
    Brightness.trouble = None
    parts = start(tmp_path / "parts")
    assert [row["failed"] for row in read_rows(tmp_path / "parts/metrics.jsonl") if "failed" in row] == [0, 4, 4]
    with np.load(whole / "params.npz") as a, np.load(parts / "params.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


def test_a_damaged_picture_is_found_before_a_run(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^config\.stages\.edit: The picture .*c\.png of line 3 of .*edits\.jsonl cannot be"
    ):
        loop.run(edits(tmp_path, damaged="c"), tmp_path / "run", load=lambda *_: pytest.fail("the run began"))
    assert not (tmp_path / "run/looked_through.txt").exists()


def test_the_first_failure_of_a_reward_is_told(tmp_path):
    stage, log = make_stage(tmp_path)

    def trouble(values):
        raise RewardError("The server is tired.")

    Brightness.trouble = trouble
    for step in range(2):
        _, metrics = stage.step(stage.init(), step)
    assert metrics["failed"] == 16 and "reward" not in metrics
    assert [line for line in log if "tired" in line] == [
        "edit, step 0: the reward 'brightness' failed: The server is tired."
    ]
