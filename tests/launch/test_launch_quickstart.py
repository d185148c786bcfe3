"""Every command of docs/quickstart.md, read out of the page: with a hub, a bucket, a judge and a detector that are stood in for, on a CPU,
and with the shipped tiny model under the ids of the real ones. Sizes are made small by flags behind the page's own, and `:tiny` is `:tiny,smoke`.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import loopback_hub
from packaging.requirements import Requirement
from PIL import Image
from scripted_http import reply, scripted

from unipic2_jax.core.assets import TINY

ROOT = Path(__file__).resolve().parents[2]
SD, KONTEXT = "stabilityai/stable-diffusion-3.5-medium", "Skywork/UniPic2-SD3.5M-Kontext-2B"
TOKEN = "hf_" + "a" * 34
PATHS = ("A node with NVIDIA GPUs", "A TPU slice", "A laptop")
DRAW = ["--steps=2", "--guidance=1"]
PICTURE = ["--height=48", "--width=48"]
CLAUSE = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"}
MARKS = {"following": 9, "overediting": 8, "naturalness": 7, "artifacts": 6}


def commands(path):
    """The commands under one of the page's headings, as words."""
    section = re.search(rf"^## {path}$(.*?)(?=^## |\Z)", (ROOT / "docs/quickstart.md").read_text(), re.M | re.S)[1]
    lines = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    return [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines()]


def stage(name, **fields):
    return [f"--config.stages.{name}.{field.replace('__', '.')}={value}" for field, value in fields.items()]


def reinforced(*names, judge="", detector=""):
    """A step of two pictures of 48 pixels for stages of the full-size recipe, in float32 as other tests compile it. `detector`: the address
    of a server's; '' is the process's own."""
    flags = ["--config.precision=float32", f"--config.stages.edit.rewards.judge.base_url={judge}/v1"]
    own = "--config.stages.edit.evaluations.t2i.rewards.geneval.detector.kind=blind"
    flags += [f"--config.stages.t2i.rewards.geneval.url={detector}" if detector else own]
    for name in names:
        flags += stage(name, steps=1, num_prompts=1, height=48, width=48, audit_every=0, optimizer__warmup=0)
        flags += stage(name, grpo__group_size=2, grpo__num_steps=2, grpo__updates_per_rollout=1, grpo__guidance_scale=1)
        drawn = {f"evaluations__t2i__{k}": v for k, v in {"num_prompts": 1, "samples": 1, "num_steps": 1}.items()}
        flags += stage(name, evaluations__t2i__height=48, evaluations__t2i__width=48, **drawn)
        flags += stage(name, evaluations__t2i__guidance_scale=1)
    return flags


def small(words, judge, detector=""):
    """Flags behind those of a command that make it small."""
    text = " ".join(words)
    if "launch.generate" in words or "launch.edit" in words:
        return [*DRAW, *(PICTURE if any(name in text for name in (SD, KONTEXT)) else ())]
    if "launch.prepare_data" in words:
        return ["--resolution=48", "--multiple=16"]
    if "launch.geneval_prompts" in words:
        return ["--counts=colors=2"]
    if ":tiny" in text:
        name = "edit" if "pdtr" in text else "finetune"
        tasks = ("t2i", "edit") if name == "edit" else ("edit",)
        few = {"num_prompts": 1, "samples": 1, "num_steps": 1, "batch_size": 1}
        scored = {f"evaluations__{task}__{field}": value for task in tasks for field, value in few.items()}
        sizes = {"grpo__group_size": 2} if name == "edit" else {"batch_size": 2}
        return [f"--config.schedule=('{name}',)", *stage(name, steps=1, optimizer__warmup=0, **scored, **sizes)]
    if "configs/finetune.py" in text:
        return ["--config.precision=float32", *stage("finetune", steps=1, batch_size=2, optimizer__warmup=0)]
    return reinforced("edit", "t2i", judge=judge, detector=detector)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """What a person has: pictures, prompts, a bucket, a hub and no accelerator."""
    home, bucket = tmp_path / "clone", tmp_path / "buckets" / "my-bucket"
    bucket.mkdir(parents=True)
    home.mkdir()
    for name in ("configs", "launch", "unipic2_jax"):
        (home / name).symlink_to(ROOT / name)
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    for folder in (home, bucket):
        Image.fromarray(noise).save(folder / "before.png")
        Image.fromarray(255 - noise).save(folder / "after.png")
        (folder / "prompts.jsonl").write_text(json.dumps(CLAUSE) + "\n")
        (folder / "tasks.jsonl").write_text(json.dumps({"image": "before.png", "prompt": "make it red"}) + "\n")
    edit = {"input_images": ["before.png"], "instruction": "make it red", "output_image": "after.png"}
    (home / "edits.jsonl").write_text((json.dumps(edit) + "\n") * 2)
    answer = {"choices": [{"message": {"role": "assistant", "content": json.dumps(MARKS)}, "finish_reason": "stop"}]}
    with (
        loopback_hub({SD: TINY, KONTEXT: TINY}, tokens={TOKEN}, gated={SD: {TOKEN}}) as hub,
        scripted(reply(answer | {"usage": {"prompt_tokens": 1, "completion_tokens": 1}})) as judge,
    ):
        variables = {
            **{"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "UNIPIC2_CACHE": str(tmp_path / "cache")},
            **{"BUCKETS": str(bucket.parent), "JAX_PLATFORMS": "cpu", "OPENAI_API_KEY": "none"},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support")]),
        }
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | variables
        yield home, bucket, environment, judge


RUNNER = (sys.executable, "-m", "quickstart_commands")


def run(world, work, accelerator="none", detector=""):
    home, _, environment, judge = world
    environment = {**environment, "ACCELERATOR": accelerator}
    lines = [
        [word.replace(":tiny", ":tiny,smoke") for word in (*words[2:], *small(words, judge.url, detector))]
        for words in work
    ]
    done = subprocess.run(
        RUNNER, cwd=home, env=environment, input=json.dumps(lines), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    print(done.stdout)
    return done.stderr


def login(world):
    """What the page's `hf auth login` does, with the token on the command line instead of at a prompt."""
    command = [Path(sys.executable).with_name("hf"), "auth", "login", "--token", TOKEN]
    done = subprocess.run(command, env=world[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def programs(path):
    return [words for words in commands(path) if words[:2] == ["python", "-m"]]


def test_every_path_has_commands_that_are_checked_here():
    """Whatever a new command is, it has to be run or looked at."""
    known = r"make (gpu|tpu)|\. \.venv/bin/activate|python -c .*|hf auth login( --token=\S+)?|pip install .*|export \w+=.*|python3 -m venv \.venv|\.venv/bin/pip install .*|python -m launch\.\w+ .*"
    for path in PATHS:
        assert commands(path) and all(re.fullmatch(known, shlex.join(words)) for words in commands(path)), path
    assert {words[2] for path in PATHS for words in programs(path)} == {
        *("launch.generate", "launch.prepare_data", "launch.train", "launch.edit", "launch.geneval_prompts"),
        "launch.serve_reward",
    }


def test_what_the_page_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]
    read = lambda file: [
        Requirement(t) for line in (ROOT / file).read_text().splitlines() if (t := line.split("#")[0].strip())
    ]
    (jax,) = (found for found in read(*dynamic["dependencies"]["file"]) if found.name == "jax")
    page = (ROOT / "docs/quickstart.md").read_text()
    for target, extra, jax_extra in (("gpu", "cuda", "cuda13"), ("tpu", "tpu", "tpu")):
        (file,) = dynamic["optional-dependencies"][extra]["file"]
        (plugin,) = read(file)
        assert (plugin.name, plugin.extras, plugin.specifier) == ("jax", {jax_extra}, jax.specifier)
        done = subprocess.run(["make", "-nB", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "-r requirements.txt" in done.stdout and f"-r {file}" in done.stdout
        assert f'pip install -e ".[{extra}]"' in page and f"    make {target}\n" in page
    for name in re.findall(r"pip install -r (\S+)", page):
        assert read(name)


def test_a_gpu_node(world):
    home, *_ = world
    refused = subprocess.run(
        [sys.executable, "-m", *programs(PATHS[0])[0][2:]], cwd=home, env=world[2], capture_output=True, text=True
    )
    assert refused.returncode == 2 and "is gated and you have no access; accept its licence at" in refused.stderr
    login(world)
    said = run(world, programs(PATHS[0]), "gpu")
    assert (home / "cat.png").is_file() and (home / "edited.png").is_file()
    assert (home / "runs/mine/stages/finetune/pytorch_lora_weights.safetensors").is_file()
    assert (home / "runs/pdtr/export/model_index.json").is_file() and (home / "runs/pdtr/report.md").is_file()
    assert "workdir    runs/pdtr: a checkpoint every" in said


@contextlib.contextmanager
def served(world, words):
    """The address of the page's reward server, on a machine with a GPU."""
    options = ["--host=127.0.0.1", "--port=0", '--options={"detector": {"kind": "blind"}}']
    home, _, environment, _ = world
    process = subprocess.Popen(
        RUNNER,
        cwd=home,
        env={**environment, "ACCELERATOR": "gpu", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        process.stdin.write(json.dumps([[*words[2:], *options]]))
        process.stdin.close()
        yield re.search(r"http://[\d.:]+", process.stdout.readline())[0]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_a_tpu_slice(world):
    login(world)
    serve, *others = programs(PATHS[1])
    with served(world, serve) as address:
        run(world, others, "tpu", address)
    assert (world[1] / "runs/pdtr/export/model_index.json").is_file()
    assert (world[1] / "runs/pdtr/report.md").is_file() and not (world[0] / "runs").exists()


def test_a_laptop(world):
    home, *_ = world
    run(world, programs(PATHS[2]))
    assert (home / "x.png").is_file() and (home / "y.png").is_file()
    assert (home / "runs/pdtr/export/model_index.json").is_file()
