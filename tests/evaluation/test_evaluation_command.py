"""`launch.evaluate` on the shipped models."""

import json
import os
import subprocess
import sys
from pathlib import Path

from unipic2_jax.core.assets import TINY_METAQUERY

ROOT = Path(__file__).parents[2]


def evaluate(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "launch.evaluate", *(f"--{a}" for a in arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_scores_gates_and_baselines(tmp_path):
    small = ("suite=shapes", "prompts=13", "samples=1", "steps=4")
    done = evaluate(*small, f"out={tmp_path}")
    assert done.returncode == 0 and "position" in done.stdout and (tmp_path / "edit.png").exists(), done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    # No worse than itself; and worse than one that is always right.
    same = evaluate(*small, "gates", f"baseline={tmp_path / 'scores.json'}")
    assert same.returncode == 0 and "all gates passed" in same.stdout, same.stdout
    (tmp_path / "scores.json").write_text(json.dumps({task: dict.fromkeys(own, 1.0) for task, own in scores.items()}))
    worse = evaluate(*small, "gates", f"baseline={tmp_path / 'scores.json'}")
    assert worse.returncode == 1 and "below the baseline's 1.000" in worse.stdout
    (tmp_path / "scores.json").write_text("{}")
    done = evaluate(*small, "gates", f"baseline={tmp_path / 'scores.json'}")
    assert (
        done.returncode == 2 and "holds no scores of this benchmark" in done.stderr and "Traceback" not in done.stderr
    )


def test_questions_are_answered_and_written_down(tmp_path):
    done = evaluate("suite=shapes-vqa", f"model={TINY_METAQUERY}", "questions=18", f"out={tmp_path}", "gates")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = sum(line["answer"] == line["right"] for line in lines) / 18
    assert len(lines) == 18 and f"overall{right:19.3f}" in done.stdout, done.stdout
    assert done.returncode == (0 if right >= 0.9 else 1)
