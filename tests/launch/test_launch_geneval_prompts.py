"""`launch.geneval_prompts`: files that training reads, and one sentence for flags that say nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unipic2_jax.data.prompts import JSONLSource
from unipic2_jax.rewards.geneval.prompts import read_digests

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "launch.geneval_prompts", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_two_disjoint_files(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    done = run("--counts=position=30,counting=100", f"--out={first}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}: 130 prompts (position 30, counting 100)\n"
    again = run("--counts=counting=60", f"--exclude={first}", f"--out={second}")
    assert again.returncode == 0, again.stderr
    assert len(JSONLSource(str(second))) == 60 and not read_digests(first) & read_digests(second)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--counts=position",), "write each tag once with a number"),
        (("--counts=colors=9999",), "has only 696 prompts"),
        (("--counts=colors=1", "--exclude=none.jsonl"), "none.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, flags, words):
    done = run(*flags, f"--out={tmp_path / 'x.jsonl'}")
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x.jsonl").exists()
