"""The stage that teaches an EditReward, on edits whose marks can be read off the pictures."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from edit_reward_models import RANK, make_model
from PIL import Image

from configs.edit_reward import get_config
from unipic2_jax.core.errors import ConfigError, TrainingError
from unipic2_jax.data.buckets import Bucket
from unipic2_jax.data.labelled_edits import LabelledEdits
from unipic2_jax.data.prepared import INDEX, PreparedExample, PreparedIndex, Shard, pack
from unipic2_jax.models.edit_reward.model import EditRewardModel
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training import loop, setup
from unipic2_jax.training.config import make_config, make_stage, validate
from unipic2_jax.training.stage import StageContext, stage_class

TARGETS = ("instruction", "quality")


def png(picture):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def write_edits(folder, count, seed=0, marks=("instruction", "quality", "score"), scale=1.0, prompts="ab"):
    """Black sources; an edit is as good as it is bright."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / "1x1-ref1-00000.array_record"), "group_size:1")
    for number in range(count):
        level = rng.random()
        source, edited = (np.full((16, 16, 3), v, np.uint8) for v in (number % 8, int(level * 255)))
        own = {name: np.float32(level * scale) for name in marks}
        writer.write(
            pack(PreparedExample(png(edited), prompts[number % len(prompts)], (png(source),), own, str(number)))
        )
    writer.close()
    shard = Shard("1x1-ref1-00000.array_record", Bucket("1:1", 1), count)
    (folder / INDEX).write_text(PreparedIndex(16, 8, (shard,), tuple(marks)).to_json())
    return folder


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    root = tmp_path_factory.mktemp("edits")
    return {"data": str(write_edits(root / "train", 96)), "heldout": str(write_edits(root / "heldout", 40, 1))}


def stage_of(tmp_path, edits, devices=1, model=None, **fields):
    values = {
        "kind": "regression",
        **edits,
        "batch_size": 16,
        "steps": 30,
        "remat": "none",
        "lora": {"rank": RANK, "alpha": 7.5},
    }
    config = make_stage({**values, "optimizer": {"lr": 1e-2, "weight_decay": 0.0}, **fields})
    mesh = make_mesh(jax.devices()[:devices])
    stage_class("regression").check(config, mesh)
    model = model or make_model(tmp_path / "vlm", targets=TARGETS)
    return stage_class("regression")(config, model, StageContext("reward", 0, 0, mesh, tmp_path))


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "stream"])
def test_it_learns_the_marks(tmp_path, edits, in_memory):
    stage = stage_of(tmp_path, edits, in_memory=in_memory)
    state = stage.init()
    before, losses = stage.evaluate(state, 0), []
    for step in range(30):
        state, metrics = stage.step(state, step)
        losses.append(float(metrics["loss"]))
    after = stage.evaluate(state, 30)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    found = after["metrics"]
    assert found["edit_reward/spearman"] > max(0.6, before["metrics"]["edit_reward/spearman"])
    assert {f"edit_reward/{n}" for n in ("pearson", "pairs", "group_pairs", "calibration_error")} <= found.keys()
    assert found["edit_reward/spearman/quality"] > 0.6 and len(after["scores"]["edit_reward/error"]) == 40
    assert sum(v for k, v in found.items() if k.endswith("_count")) == 40
    assert after["images"]["edit_reward_reliability"].size[0] > 100
    done = stage.finish(state)
    assert done.params["vlm"] is stage.model.params["vlm"] and done.spec.base == stage.model.spec.base
    stage.export(state, tmp_path)
    assert json.loads((tmp_path / "calibration.json").read_text())["spearman"] == found["edit_reward/spearman"]
    done.save(tmp_path / "out")
    np.testing.assert_array_equal(
        EditRewardModel.load(tmp_path / "out").params["head"]["bias"], state.trained["head"]["bias"]
    )


def test_rows_and_steps_are_the_same_from_memory_and_streamed(tmp_path, edits):
    model = make_model(tmp_path / "vlm", targets=TARGETS)
    one, other = (stage_of(tmp_path, edits, model=model, in_memory=kept) for kept in (True, False))
    states = [stage.init() for stage in (one, other)]
    for step in range(2):
        results = [stage.step(state, step) for stage, state in zip((one, other), states)]
        states = [state for state, _ in results]
    assert results[0][1]["loss"] == pytest.approx(results[1][1]["loss"], rel=1e-3)


def test_a_streamed_stage_goes_on_with_the_same_bits_whatever_it_has_seen(tmp_path, edits):
    """The longest question comes in some batches only; a stage that begins after them must not compute in another shape."""
    data = write_edits(tmp_path / "long", 48, prompts=["a"] * 23 + ["b" * 90])
    model, fields = make_model(tmp_path / "vlm", targets=TARGETS), {**edits, "data": str(data), "batch_size": 4}
    whole, later = (stage_of(tmp_path, fields, model=model) for _ in range(2))
    lengths = [whole._training_rows(step).given.input_ids.shape[1] for step in range(8)]
    longest, short = lengths.index(max(lengths)), lengths[-1]
    assert longest < 6 and short < max(lengths) - 50
    state = whole.init()
    for step in range(7):
        state, _ = whole.step(state, step)
    kept = jax.tree.map(np.array, state)
    (one, _), (other, _) = whole.step(state, 7), later.step(later.place(kept), 7)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_everything_can_be_trained(tmp_path, edits):
    model = make_model(tmp_path / "vlm", targets=TARGETS)
    with pytest.raises(ConfigError, match=r"give lora\.rank its rank"):
        stage_of(tmp_path, edits, model=model, lora={"rank": 0})
    plain = dataclasses.replace(model, params={k: v for k, v in model.params.items() if k != "lora"})
    stage = stage_of(tmp_path, edits, model=plain, lora={"rank": 0}, in_memory=True)
    state = stage.init()
    stage.release()
    state, first = stage.step(state, 0)
    done = stage.finish(state)
    assert done.spec.base is None and "lora" not in done.params and np.isfinite(first["loss"])
    done.save(tmp_path / "full")
    assert (tmp_path / "full" / "vlm" / "model.safetensors").is_file() and EditRewardModel.check(
        tmp_path / "full"
    ).base is None


def test_a_run_that_is_killed_after_its_last_evaluation_ends_the_same(tmp_path, edits, monkeypatch):
    """Its last evaluation is recorded and not made again, and calibration.json is written all the same."""
    model = make_model(tmp_path / "vlm", targets=TARGETS)
    fields = {"kind": "regression", **edits, "batch_size": 16, "steps": 3, "remat": "none", "in_memory": True}
    fields |= {"lora": {"rank": RANK, "alpha": 7.5}, "optimizer": {"lr": 1e-2}, "gate": -1.0}

    def run(name):
        config = make_config({"model": "edit_reward", "schedule": ("reward",), "stages": {"reward": fields}})
        loop.run(config, tmp_path / name, load=lambda *_: model, mesh=make_mesh(jax.devices()[:1]))
        written = [tmp_path / name / "stages/reward/calibration.json", *(tmp_path / name / "export").iterdir()]
        return {path.name: path.read_bytes() for path in written}

    def killed(self, state):
        raise KeyboardInterrupt

    whole = run("whole")
    assert {"calibration.json", "head.safetensors", "adapter_model.safetensors"} <= whole.keys()
    with monkeypatch.context() as patch:
        patch.setattr(stage_class("regression"), "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    assert run("killed") == whole


def test_the_gate_fails_loudly(tmp_path, edits):
    stage = stage_of(tmp_path, edits, gate=0.999, in_memory=True)
    with pytest.raises(TrainingError, match=r"Spearman correlation of .* below the gate of 0\.999"):
        stage.finish(stage.init())


def test_what_cannot_be_trained_is_said(tmp_path, edits):
    check = stage_class("regression").check
    mesh = make_mesh(jax.devices()[:1])
    with pytest.raises(ConfigError, match="data names no folder of scored edits"):
        check(make_stage({"kind": "regression"}), mesh)
    with pytest.raises(FileNotFoundError, match=r"holds no dataset\.json"):
        check(make_stage({"kind": "regression", **edits, "data": str(tmp_path)}), mesh)
    bare = write_edits(tmp_path / "bare", 4, marks=("instruction", "score"))
    with pytest.raises(ValueError, match=r"have no mark 'quality' \(they have instruction, score\)"):
        stage_of(tmp_path, {**edits, "data": str(bare)})
    with pytest.raises(ConfigError, match=r"set config\.model to 'edit_reward'"):
        stage_of(tmp_path, edits, model=object())
    wide = write_edits(tmp_path / "wide", 8, scale=10.0)
    stage = stage_of(tmp_path, {**edits, "data": str(wide)})
    with pytest.raises(TrainingError, match="outside 0 to 1"):
        stage.step(stage.init(), 0)
    with pytest.raises(ValueError, match=r"--config\.vlm=DIR"):
        config = get_config("lora")
        config.vlm = None
        setup.load_model(config, mesh)


def test_data_is_numbered_over_buckets(edits):
    data = LabelledEdits(edits["data"], ("score",))
    assert len(data) == 96 and data[95].name == "95" and set(data[95].arrays) == {"instruction", "quality", "score"}


def test_folders_of_edits_can_be_joined(edits):
    both = LabelledEdits(f"{edits['data']},{edits['heldout']}", ("score",))
    heldout = LabelledEdits(edits["heldout"], ("score",))
    assert len(both) == 96 + len(heldout)
    assert both[96].image == heldout[0].image and both[95].name == "95"


@pytest.mark.parametrize("arg", ["", "lora", "tiny", "tiny,smoke", "tiny,again", "tiny,again,smoke"])
def test_recipes_are_valid(arg):
    config = validate(get_config(arg))
    assert {config.stages[name].kind for name in config.schedule} == {"regression"}
    with pytest.raises(ValueError, match="no variant 'huge'"):
        get_config("huge")
    with pytest.raises(ValueError, match="write 'tiny' too"):
        get_config("again")
