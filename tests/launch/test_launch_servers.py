"""The two servers as a person starts and ends them."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests

from unipic2_jax.core.assets import TINY_METAQUERY
from unipic2_jax.data.prompts import PromptRecord, make_source
from unipic2_jax.rewards.base import RewardError, make_reward

ROOT = Path(__file__).parents[2]


def start(name, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('MORE_PATH', '')}",
        "JAX_PLATFORMS": "cpu",
        "SERVER_KEY": "sesame",
    }
    line = [sys.executable, "-m", f"launch.{name}", *(f"--{a}" for a in arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


@contextlib.contextmanager
def serving(name, *arguments):
    """The address that the command prints; SIGTERM must then end it at once and cleanly."""
    process = start(name, *arguments)
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), process.stderr.read()
        yield address
        process.send_signal(signal.SIGTERM)
        rest, told = process.communicate(timeout=20)
        assert process.returncode == 0 and not rest and "Traceback" not in told, told
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def key():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVER_KEY", "sesame")
        yield "SERVER_KEY"


def test_a_reward_s_server_and_its_client(key):
    records = make_source({"kind": "shapes", "task": "edit"}, 0).batch(0, 6)
    pictures = [record.image for record in records]
    own = make_reward("shapes_edit", strict_weight=0.25).score(pictures, records)
    with serving("serve_reward", "reward=shapes_edit", 'options={"strict_weight": 0.25}', f"api_key_env={key}") as url:
        assert requests.get(f"{url}/health", timeout=5).json()["reward"] == "shapes_edit"
        found = make_reward("remote", url=url, api_key_env=key).score(pictures, records)
        np.testing.assert_array_equal(found.values, own.values)
        with pytest.raises(RewardError, match=r"refused the key .*name its variable as api_key_env"):
            make_reward("remote", url=url).score(pictures, records)


def test_a_reward_of_one_s_own_is_imported_and_served(tmp_path, monkeypatch):
    """As docs/extending/reward.md has it."""
    page = (ROOT / "docs/extending/reward.md").read_text()
    (example,) = (part.split("```")[0] for part in page.split("```python") if '@REWARDS.register("bright")' in part)
    (tmp_path / "my_rewards.py").write_text(example)
    (tmp_path / "more.py").write_text("")
    monkeypatch.setenv("MORE_PATH", str(tmp_path))
    with serving("serve_reward", "import=more", "import=my_rewards", "reward=bright", 'options={"target": 1}') as url:
        found = make_reward("remote", url=url).score([np.full((4, 4, 3), 51, np.uint8)], [PromptRecord("a")])
    assert found.values == pytest.approx([0.2]) and found.details["brightness"] == pytest.approx([0.2])


def test_a_judge_asks_the_vlm_s_server(key, tmp_path):
    (tmp_path / "question.txt").write_text("$prompt")
    with serving("serve_vlm", f"model={TINY_METAQUERY}", f"api_key_env={key}") as url:
        options = {"model": "tiny_metaquery", "template": str(tmp_path / "question.txt"), "request": {"max_tokens": 16}}
        judge = make_reward("judge", base_url=url, api_key_env=key, **options)
        picture = np.zeros((32, 32, 3), np.uint8)
        with pytest.raises(RewardError, match=r"The judge wrote|cut off"):
            judge.score([picture], [PromptRecord("describe the image.")])
        assert judge.usage.answers == 1 and judge.usage.completion_tokens > 0
        with pytest.raises(RewardError, match="name its variable"):
            make_reward("judge", base_url=url, api_key_env="", **options).score([picture], [PromptRecord("a")])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("serve_reward", "reward=shapes_t2i", "options={"), "--options is not JSON"),
        (("serve_reward", "reward=bright", "import=nowhere"), "--import=nowhere cannot be imported (No module named"),
        (("serve_reward", "reward=bright", "import="), "--import= cannot be imported"),
        (("serve_reward", "reward=shapes_t2i", "api_key_env=NOT_SET_HERE"), "NOT_SET_HERE, which is not set"),
        (("serve_reward", "reward=shapes_t2i", "host=192.0.2.1"), "192.0.2.1:0 cannot be listened on"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence):
    process = start(*arguments)
    out, told = process.communicate(timeout=60)
    assert process.returncode == 2 and not out
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and sentence in lines[0] and "Traceback" not in told
