"""`launch.reproduce` from nothing to a table, with two steps for everything."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import reproduce

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
