"""The launchers as far as a machine without the cluster can: linted, and run against stand-ins of srun, scontrol and xpk."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs import pdtr

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "launch" / "cluster"
SCRIPTS = ["slurm.sbatch", "xpk.sh"]


def lint(program, *arguments, text=None):
    """Runs a linter that lies beside this Python; skips where it is not installed."""
    found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{program} is not installed (requirements-dev.txt)")
    done = subprocess.run([found, *map(str, arguments)], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_are_clean(script):
    lint("shellcheck", CLUSTER / script)


@pytest.mark.parametrize("file", ["Dockerfile.gpu", "Dockerfile.tpu"])
def test_docker_files_are_clean(file):
    lint("hadolint", CLUSTER / file)


def sky():
    return yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())


def test_skypilot_s_commands_are_clean():
    task = sky()
    assert set(task) <= {"name", "num_nodes", "workdir", "resources", "envs", "file_mounts", "setup", "run"}
    known = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"} | task["envs"].keys()
    assert set(re.findall(r"\$\{?([A-Z_]+)", task["run"])) <= known
    exports = "\n".join(f"export {name}=" for name in sorted(known))
    lint("shellcheck", "--shell=bash", "--exclude=SC2155", "-", text=f"{exports}\n{task['setup']}\n{task['run']}")


def test_what_they_set_exists():
    """Fields of the configuration and recipes that a launcher or its page names."""
    config = pdtr.get_config("")
    texts = [path.read_text() for path in CLUSTER.iterdir()] + [(ROOT / "docs" / "clusters.md").read_text()]
    fields = {field for text in texts for field in re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)", text)}
    assert "parallel.slices" in fields
    for field in fields - {"field"}:
        node = config
        for part in field.split("."):
            assert part in node, field
            node = node[part]
    assert all((ROOT / recipe).exists() for text in texts for recipe in re.findall(r"configs/\w+\.py", text))


def stand_in(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run(script, *arguments, folder, **environment):
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **environment}
    return subprocess.run([str(CLUSTER / script), *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("code, again", [(0, False), (143, True), (75, True), (1, False)])
def test_slurm_queues_again_what_can_go_on(tmp_path, code, again):
    stand_in(tmp_path, "srun", f'echo "srun $*"; exit {code}')
    stand_in(tmp_path, "scontrol", 'echo "scontrol $*"')
    arguments = ["configs/pdtr.py", "/w", "--config.seed=3"]
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "12", "PYTHON": "py"}
    command = ["bash", str(CLUSTER / "slurm.sbatch"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code
    assert "py -m launch.train --config=configs/pdtr.py --workdir=/w --config.seed=3" in done.stdout
    assert ("scontrol requeue 12" in done.stdout) == again


def test_xpk_is_given_the_whole_command(tmp_path):
    stand_in(tmp_path, "xpk", "printf '%s\\n' \"$@\"")
    where = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "IMAGE": "i", "TPU_TYPE": "v5p-128", "SLICES": "2"}
    flag = "--config.schedule=('t2i','edit')"
    done = run("xpk.sh", "name", "configs/pdtr.py", "/w", flag, folder=tmp_path, **where)
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    assert given[:2] == ["workload", "create"] and "--num-slices=2" in given and "--workload=name" in given
    command = next(line for line in given if line.startswith("--command=")).removeprefix("--command=")
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[:3] == ["python", "-m", "launch.train"] and "--config.parallel.slices=2" in words and flag in words
    missing = run("xpk.sh", "name", "configs/pdtr.py", "/w", folder=tmp_path, **{**where, "IMAGE": ""})
    assert missing.returncode != 0 and "Dockerfile.tpu" in missing.stderr
