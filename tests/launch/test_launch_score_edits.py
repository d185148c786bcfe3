"""From nothing to a reward: edits of the shipped model, the verifier's marks, a training of a few steps, a folder that scores."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.edit_reward import get_config
from unipic2_jax.core.errors import ConfigError
from unipic2_jax.models.edit_reward.model import EditRewardModel
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.rewards.base import make_reward
from unipic2_jax.shapes.sources import ShapesSource
from unipic2_jax.training import loop
from unipic2_jax.training.metrics import read_evaluations

ROOT = Path(__file__).resolve().parents[2]


def score_edits(*flags):
    command = [sys.executable, "-m", "launch.score_edits", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    out = tmp_path_factory.mktemp("edits") / "out"
    flags = ("--prompts=6", "--steps=1", "--guidance=1", "--unedited=0.5", "--batch=6", "--at_once=4", "--heldout=0.5")
    run = score_edits(*flags, f"--out={out}")
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("made 12, duplicates ")
    return out


def test_a_reward_is_trained_on_what_was_scored(edits, tmp_path):
    rows = [json.loads(line) for line in (edits / "scored.jsonl").read_text().splitlines()]
    assert {"score", "instruction", "preservation"} <= rows[0]["marks"].keys()
    config = get_config("tiny,smoke")
    for stage in config.stages.values():
        stage.data, stage.heldout, stage.batch_size = str(edits / "train"), str(edits / "heldout"), 4
    export = loop.run(config, tmp_path / "run", mesh=make_mesh(jax.devices()[:1]))
    assert [(r["stage"], r["step"]) for r in read_evaluations(tmp_path / "run")] == [
        *(("reward", 0), ("reward", 4)),
        *(("hard", 0), ("hard", 4)),
    ]
    assert list((tmp_path / "run" / "samples").glob("*_edit_reward_reliability.png"))
    half = tmp_path / "half"
    command = [sys.executable, "-m", "launch.export", f"--model={export}", f"--out={half}", "--dtype=float16"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert (half / "adapter_model.safetensors").stat().st_size < 120_000
    assert EditRewardModel.check(half).targets == ("instruction", "preservation", "score")
    records = ShapesSource(3, "edit").batch(0, 4)
    scores = make_reward("editreward", model=str(half), batch_size=4).score([r.image for r in records], records)
    assert np.isfinite(scores.values).all() and scores.details.keys() == {"instruction", "preservation", "score"}


def test_mistakes_are_one_sentence(edits, tmp_path):
    for flags, sentence in (
        (("--judge=harsh",), "--judge is not JSON"),
        (("--steps=few",), "--steps holds 'few'; write numbers"),
        (("--max_cost=3",), "needs the prices of a million tokens"),
    ):
        run = score_edits(*flags, f"--out={tmp_path / 'x'}")
        assert run.returncode == 2 and run.stderr.startswith("error: ") and sentence in run.stderr
        assert not (tmp_path / "x").exists()
    config = get_config("tiny,smoke")
    for stage in config.stages.values():
        stage.data = stage.heldout = str(edits / "train")
    config.vlm = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"The vision-language model .* was not found"):
        loop.run(config, tmp_path / "run", mesh=make_mesh(jax.devices()[:1]))
    config.settings.colour = "red"
    with pytest.raises(ConfigError, match=r"config\.settings\.colour is no setting of an EditReward"):
        loop.run(config, tmp_path / "run", mesh=make_mesh(jax.devices()[:1]))
