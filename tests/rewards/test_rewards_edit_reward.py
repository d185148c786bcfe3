"""The kind 'editreward': scores of pictures on any number of devices, and what a configuration may say about it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import eight_devices
import jax
import numpy as np
import pytest
from edit_reward_models import make_model

from unipic2_jax.data.prompts import UNREAD, PromptRecord
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.rewards import edit_reward as edit_scoring
from unipic2_jax.rewards.base import make_reward
from unipic2_jax.rewards.scoring import Scorer, make_entries
from unipic2_jax.shapes.rewards import ShapesEditReward

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support", ROOT / "tests" / "rewards")))
CHILD = """
import json, sys, jax
from test_rewards_edit_reward import edits, scored
from unipic2_jax.parallel.mesh import make_mesh
mesh = make_mesh(preset=sys.argv[2])
found = scored(sys.argv[1], mesh)
placed = {leaf.sharding.spec != () and not leaf.is_fully_replicated for leaf in jax.tree.leaves(found[1])}
print(json.dumps({"devices": mesh.size, "split": sorted(placed), "scores": found[0]}))
"""

SHARE = """
import json, sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from unipic2_jax.parallel import processes
processes.initialize()
from test_rewards_edit_reward import edits
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.rewards.scoring import Scorer, make_entries
mesh = make_mesh(preset="fsdp")
scorer = Scorer(make_entries({"editreward": {"model": sys.argv[1], "batch_size": 4, "combine": "mean"}}, mesh))
found = []
for split in (5, 0):  # how many of five edits are the first process's
    own = slice(0, split) if jax.process_index() == 0 else slice(split, 5)
    images, records = edits()
    found += [scorer.score(images[own], records[own]).values["editreward"].tolist()]
print("scores", json.dumps(found))
processes.wait_for_all("end")
"""


def edits(count=5):
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, 256, (16, 16, 3), np.uint8)
    records = [PromptRecord("make it red" + "!" * n, draw(), {"dataset": "ab"[n % 2]}) for n in range(count)]
    return [draw() for _ in records], records


def scored(folder, mesh):
    """Scores of the edits, and the parameters that gave them."""
    entries = make_entries({"editreward": {"model": str(folder), "batch_size": 4, "combine": "mean"}}, mesh)
    found = Scorer(entries).score(*edits())
    columns = {"score": found.values["editreward"], **found.details["editreward"]}
    return {name: column.tolist() for name, column in columns.items()}, entries["editreward"].reward._model.params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    return make_model(root / "vlm").save(root / "reward")


def test_value_and_details(folder):
    found, _ = scored(folder, make_mesh(jax.devices()[:1]))
    scores = np.array([found["instruction"], found["quality"]])
    np.testing.assert_allclose(found["score"], scores.mean(axis=0))
    assert np.ptp(scores, axis=1).min() > 0


@pytest.mark.parametrize("preset", ["ddp", "fsdp"])
def test_eight_devices_give_the_scores_of_one(folder, preset):
    want, _ = scored(folder, make_mesh(jax.devices()[:1]))
    env = {**eight_devices.ENVIRONMENT, "PYTHONPATH": PATHS}
    command = [sys.executable, "-c", CHILD, str(folder), preset]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["devices"] == 8 and found["split"] == ([False] if preset == "ddp" else [False, True])
    for name, column in want.items():
        np.testing.assert_allclose(found["scores"][name], column, rtol=1e-5)


def test_processes_with_unequal_numbers_of_edits(folder):
    """All of them are one process's, and the other takes part in every batch with nothing of its own."""
    want, _ = scored(folder, make_mesh(jax.devices()[:1]))
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_PROCESSES": "2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    }
    env["PYTHONPATH"] = PATHS
    command = [sys.executable, "-c", SHARE, str(folder)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**env, "JAX_PROCESS_ID": str(n)}, **options) for n in range(2)]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    shares = [json.loads(out.split("scores ")[1]) for out, _ in outputs]
    for turn in range(2):
        scores = shares[0][turn] + shares[1][turn]
        np.testing.assert_allclose(scores, want["score"], rtol=1e-5)


def test_a_judge_is_in_memory_once_and_reads_when_it_is_asked(folder, monkeypatch):
    read, load = [], edit_scoring.EditRewardModel.load
    monkeypatch.setattr(edit_scoring.EditRewardModel, "load", lambda *a, **k: read.append(a) or load(*a, **k))
    mesh = make_mesh(jax.devices()[:1])
    one, other = (make_reward("editreward", mesh, model=str(folder), combine=how) for how in ("geometric", "quality"))
    assert not read
    images, records = edits(2)
    geometric, quality = (reward.score(images, records) for reward in (one, other))
    assert len(read) == 1
    np.testing.assert_array_equal(quality.values, geometric.details["quality"])
    np.testing.assert_allclose(geometric.values, np.sqrt(np.prod(list(geometric.details.values()), axis=0)))
    # A process whose devices have no pictures takes part.
    assert one.score([], []).values.shape == (0,)


def test_only_records_that_it_is_about(folder):
    entries = make_entries({"editreward": {"model": str(folder), "datasets": ("a",)}}, make_mesh(jax.devices()[:1]))
    found = Scorer(entries).score(*edits())
    assert np.isnan(found.values["editreward"]).tolist() == [False, True, False, True, False]


def test_what_cannot_be_is_said(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"rewards\.r: combine is 'beauty'; use one of geometric, mean, instruction, quality"
    ):
        make_entries({"r": {"kind": "editreward", "model": str(folder), "combine": "beauty"}})
    with pytest.raises(ValueError, match=r"rewards\.r: .*does not take these options .*timeout"):
        make_entries({"r": {"kind": "editreward", "model": str(folder), "timeout": 3}})
    with pytest.raises(FileNotFoundError, match="There is no EditReward folder"):
        make_entries({"r": {"kind": "editreward", "model": str(tmp_path / "gone")}})
    with pytest.raises(ValueError, match=r"rewards\.r: no EditReward is named; give its folder"):
        make_entries({"r": {"kind": "editreward"}})
    with pytest.raises(ValueError, match="batch_size is 0; use 1 or more"):
        make_reward("editreward", model=str(folder), batch_size=0)
    reward = make_reward("editreward", make_mesh(jax.devices()[:1]), model=str(folder))
    with pytest.raises(ValueError, match="'a red circle' comes without a picture to edit"):
        reward.score(edits(1)[0], [PromptRecord("a red circle")])
    with pytest.raises(ValueError, match="'a red circle' comes without a picture to edit"):
        reward.check([PromptRecord("a red circle")])
    reward.check([PromptRecord("make it red", UNREAD)])


def test_a_noisy_verifier_errs_the_same_way_each_time():
    from unipic2_jax.shapes.sources import ShapesSource

    records = ShapesSource(0, "edit").batch(0, 64)
    images = [record.image for record in records]
    exact, noisy, again, other = (
        ShapesEditReward(noise=noise, seed=seed).score(images, records)
        for noise, seed in ((0.0, 0), (0.1, 0), (0.1, 0), (0.1, 1))
    )
    np.testing.assert_array_equal(noisy.values, again.values)
    # A picture's error is its own, whatever else is judged with it.
    alone = ShapesEditReward(noise=0.1).score(images[5:6], records[5:6])
    assert alone.values[0] == noisy.values[5] and (noisy.values != other.values).any()
    for name in ("preservation", "instruction"):
        assert noisy.details[name].min() >= 0 and noisy.details[name].max() <= 1
        difference = noisy.details[name] - exact.details[name]
        assert 0.02 < np.abs(difference).mean() < 0.2
    np.testing.assert_array_equal(noisy.details["correct"], exact.details["correct"])
    with pytest.raises(ValueError, match="noise is -1; use 0 or more"):
        ShapesEditReward(noise=-1)
