"""A run that is killed and continued ends with the same bits as one that is not."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_stage

from unipic2_jax.training import loop
from unipic2_jax.training.metrics import read_evaluations, read_rows

FIELDS = {"save_every": 1, "eval_every": 5}
PATIENCE = 900  # seconds; a loaded machine must not fail a test of bits


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything already, so that a kill a moment later hits the run itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_stage"])
    return context


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    toy_stage.run(workdir, **FIELDS)
    return contents(workdir)


def contents(workdir):
    """All of a run that must not depend on interruptions."""
    rows = read_rows(workdir / "metrics.jsonl")
    with np.load(workdir / "export" / "params.npz") as arrays:
        params = {name: arrays[name].tobytes() for name in arrays.files}
    record = json.loads((workdir / "checkpoints/states/19/record/metadata").read_text())
    return {
        "rows": [{k: v for k, v in row.items() if k != "seconds_step"} for row in rows],
        "evaluations": read_evaluations(workdir),
        "export": params,
        "state": record["checksums"],
        "samples": sorted(p.name for p in (workdir / "samples").iterdir()),
    }


def start(processes, workdir, trouble=None):
    process = processes.Process(target=toy_stage.child, args=(str(workdir), FIELDS, trouble or {}))
    process.start()
    return process


def test_killed_inside_a_step_of_each_stage(processes, reference, tmp_path):
    for kill_at in (4, 9, 2):
        process = start(processes, tmp_path / "run", {"kill_at": kill_at})
        process.join(PATIENCE)
        assert process.exitcode in (-signal.SIGKILL, 0)
    toy_stage.run(tmp_path / "run", **FIELDS)
    assert contents(tmp_path / "run") == reference


def test_killed_at_random_moments(processes, reference, tmp_path):
    """Every step saves, so many of the kills fall into a save; each waits for some progress beyond the last one."""
    workdir, rng, kills = tmp_path / "run", np.random.default_rng(0), 0
    states = workdir / "checkpoints" / "states"
    progress = lambda: max((int(p.name) for p in states.glob("*") if p.name.isdigit()), default=0)
    for _ in range(5):
        process, before = start(processes, workdir), progress()
        deadline = time.monotonic() + PATIENCE
        while process.is_alive() and progress() <= before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.25))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join(PATIENCE)
    assert kills >= 2
    toy_stage.run(workdir, **FIELDS)
    assert contents(workdir) == reference


def test_sigterm_saves_and_says_so(processes, reference, tmp_path):
    process = start(processes, tmp_path / "run", {"term_at": 7})
    process.join(PATIENCE)
    assert process.exitcode == 128 + signal.SIGTERM
    assert (tmp_path / "run/checkpoints/states/8").exists()
    toy_stage.run(tmp_path / "run", **FIELDS)
    assert contents(tmp_path / "run") == reference


@pytest.mark.parametrize("damage", ["flip", "truncate", "record"])
def test_damaged_newest_checkpoint_falls_back(reference, tmp_path, capsys, damage):
    workdir = tmp_path / "run"
    toy_stage.TROUBLE["term_at"] = 9
    try:
        with pytest.raises(SystemExit):
            toy_stage.run(workdir, **FIELDS)
    finally:
        toy_stage.TROUBLE.clear()
    newest = workdir / "checkpoints/states/10"
    if damage == "record":
        (newest / "record" / "metadata").write_text("{")
    else:
        for path in (newest / "state").rglob("d/*"):  # where array data lies
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    toy_stage.run(workdir, **FIELDS)
    said = capsys.readouterr().err
    assert "states/10 cannot be read" in said and "Continuing after step 9" in said
    assert contents(workdir) == reference


def test_a_disk_that_fills_up_stops_with_a_sentence_and_loses_nothing(processes, tmp_path, capsys):
    fields = {**FIELDS, "ballast": 1 << 16}
    output = tmp_path / "said"
    process = processes.Process(target=toy_stage.child, args=(str(tmp_path / "run"), fields, {"full_at": 4}, output))
    process.start()
    process.join(PATIENCE)
    said = output.read_text()
    assert process.exitcode == 1 and "TrainingError: A checkpoint could not be written" in said, said
    assert "states/4: make room there" in said.splitlines()[-1]
    toy_stage.run(tmp_path / "run", **fields)
    assert "Continuing after step 4" in capsys.readouterr().err
    assert (tmp_path / "run/export").is_dir()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/sys is a folder that nobody can write to")
def test_a_workdir_that_cannot_be_written_is_named_before_any_work():
    with pytest.raises(loop.config_lib.ConfigError, match=r"^The workdir /sys/run cannot be written \("):
        toy_stage.run("/sys/run")


def test_a_checkpoint_that_reads_back_damaged_does_not_replace_an_older_one(tmp_path, monkeypatch, capsys):
    from unipic2_jax.training.checkpoints import Checkpoints

    damaged, verify = [], Checkpoints._damaged

    def damage(self, step):
        if step == 8:
            for path in (self.path(step) / "state").rglob("d/*"):
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 4
                path.write_bytes(data)
            damaged.append(self.steps())
        return verify(self, step)

    monkeypatch.setattr(Checkpoints, "_damaged", damage)
    toy_stage.run(tmp_path / "run", **FIELDS)
    # While 8 was not known to be good, three others were there; it was removed and the run went on.
    assert damaged == [[5, 6, 7, 8]]
    assert "states/8 was written and reads back damaged" in capsys.readouterr().err
    left = sorted(int(path.name) for path in (tmp_path / "run/checkpoints/states").iterdir())
    assert left == [17, 18, 19]


def test_another_configuration_is_refused(tmp_path):
    toy_stage.run(tmp_path / "run")
    with pytest.raises(loop.config_lib.ConfigError, match=r"config.seed = 0, and this command asks for 3"):
        toy_stage.run(tmp_path / "run", seed=3)
    with pytest.raises(loop.config_lib.ConfigError, match=r"config.stages.first.steps = 12"):
        toy_stage.run(tmp_path / "run", steps=13)
    toy_stage.run(tmp_path / "run", save_every=4)


def test_nan_stops_with_the_last_good_checkpoint(tmp_path):
    sentence = r"Step 7 of stage .first. gave loss = nan.*checkpoints/states/6"
    with pytest.raises(loop.TrainingError, match=sentence) as error:
        toy_stage.run(tmp_path / "run", nan_at=7)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/export").exists()
    assert read_rows(tmp_path / "run/metrics.jsonl")[-1]["step"] == 7


def test_a_model_that_cannot_be_loaded_leaves_a_folder_that_can_be_used(tmp_path):
    def broken(config, mesh):
        raise ValueError("The tensor x is missing.")

    with pytest.raises(loop.config_lib.ConfigError, match=r"^The tensor x is missing\.$"):
        loop.run(toy_stage.toy_config(seed=1), tmp_path / "run", load=broken, save=toy_stage.save)
    toy_stage.run(tmp_path / "run", steps=1)
