"""`launch.reproduce` from nothing to a table, with two steps for everything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
