"""`launch.reproduce` from nothing to a table, with two steps for everything."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from configs.ablations import get_config
from launch import reproduce
from unipic2_jax.core.errors import ConfigError
from unipic2_jax.training.config import validate, write_config

ROOT = Path(__file__).resolve().parents[2]


def test_runs_at_a_time_share_the_cores_and_stop_at_the_first_failure(monkeypatch):
    started, together, given = [], threading.Barrier(2, timeout=30), []

    def train(run, workdir, seed, cores):
        started.append(run)
        given.append(cores)
        if run in ("a", "b"):
            together.wait()  # both at once
        if run == "c":
            raise RuntimeError("The run c ended with 1.")

    monkeypatch.setattr(reproduce, "train", train)
    runs = [(name, Path(name), 0) for name in "ab"]
    reproduce.train_all(runs, 2)
    assert sorted(started) == ["a", "b"]
    assert not given[0] & given[1] and given[0] | given[1] == os.sched_getaffinity(0)
    started.clear()
    with pytest.raises(RuntimeError, match="run c"):
        reproduce.train_all([(name, Path(name), 0) for name in "dcefghi"], 1)
    assert started == ["d", "c"]


def test_what_a_run_goes_on_from_is_done_before_it():
    found = reproduce.waves(["both", "dit"], Path("x"), 2)
    assert [[path.name for _, path, _ in wave] for wave in found] == [
        ["connector"],
        ["both-seed0", "both-seed1", "dit-seed0", "dit-seed1"],
    ]
    first, second = reproduce.waves(["judge_geneval", "geneval", "joint"], Path("x"), 1)
    assert [run for run, *_ in first] == ["geneval", "joint", "judge"]
    assert second == [("judge_geneval", Path("x/judge_geneval-seed0"), 0)]


def test_a_finished_run_of_another_scale_is_not_taken(monkeypatch, tmp_path):
    """Two steps of everything are no row of the table."""
    for name, value in (("_SCALE", "smoke"), ("_WORKDIR", str(tmp_path))):
        monkeypatch.setattr(reproduce, name, SimpleNamespace(value=value))
    workdir = tmp_path / "judge-seed1"
    (workdir / "export").mkdir(parents=True)
    config = get_config(reproduce.words("judge", tmp_path))
    config.seed = 1
    write_config(validate(config), workdir / "config.json")
    reproduce.train("judge", workdir, 1)
    with pytest.raises(ConfigError, match=r"config\.seed = 1, and this command asks for 0"):
        reproduce.train("judge", workdir, 0)
    monkeypatch.setattr(reproduce, "_SCALE", SimpleNamespace(value="tiny"))
    with pytest.raises(ConfigError, match="holds a run with config"):
        reproduce.train("judge", workdir, 1)


@pytest.mark.slow
def test_the_table_of_rewards_is_made_with_curves_and_pictures(tmp_path):
    command = [sys.executable, "-m", "launch.reproduce", "--scale=smoke", "--seeds=2", f"--workdir={tmp_path}"]
    done = subprocess.run([*command, "--table=4", "--jobs=2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "table4.md").read_text()
    assert text in done.stdout and text.count("±") == 7 * 4
    for name in ("table4", "table4_rewards", "table4_samples_edit", "table4_samples_t2i"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.getcolors(1 << 24)) > 10
    # A second stage goes on from where the first one ended.
    config = json.loads((tmp_path / "judge_geneval-seed1/config.json").read_text())
    assert config["init"] == str(tmp_path / "judge-seed1/export") and config["seed"] == 1


@pytest.mark.slow
def test_a_table_is_made_and_made_again_without_training(tmp_path):
    command = [sys.executable, "-m", "launch.reproduce", "--scale=smoke", "--seeds=2", f"--workdir={tmp_path}"]
    first = subprocess.run([*command, "--table=3", "--jobs=2"], cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "compiled the step" in (tmp_path / "both-seed1.log").read_text()
    text = (tmp_path / "table3.md").read_text()
    assert text in first.stdout and text.count("±") == 6 and (tmp_path / "table3.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/export/**/*.safetensors")}
    again = subprocess.run([*command, "--table=3"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and (tmp_path / "table3.md").read_text() == text
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/export/**/*.safetensors")}
