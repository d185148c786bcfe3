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
from unipic2_jax.parallel.processes import LOST_PEER

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


@pytest.mark.parametrize(
    "nodes, workdirs, runs", [(1, "/bucket/runs", True), (2, "/bucket/runs", False), (2, "/shared/runs", True)]
)
def test_skypilot_s_nodes_share_no_bucket(tmp_path, nodes, workdirs, runs):
    """What MOUNT_CACHED keeps on one node's disk the others do not see; MOUNT cannot append."""
    task = sky()
    assert task["num_nodes"] == 1 and task["envs"]["WORKDIRS"].startswith("/bucket/")
    assert task["file_mounts"]["/bucket"]["mode"] == "MOUNT_CACHED"
    assert LOST_PEER in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stand_in(tmp_path / ".venv/bin", "python", 'echo "$JAX_COORDINATOR_ADDRESS $*"')
    given = {**task["envs"], "WORKDIRS": workdirs, "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": "0"}
    given["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2"
    env = {**os.environ, **given}
    done = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) is runs, done.stderr
    assert (f"10.0.0.1:8476 -m launch.train --config=configs/pdtr.py --workdir={workdirs}/pdtr" in done.stdout) is runs
    assert ("set WORKDIRS" in done.stderr) is not runs


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


# Three tasks side by side; the highest code, 128 + signal for one that was killed, is srun's own.
SRUN = """
highest=0
echo "srun $*"
while [[ $1 == --* ]]; do shift; done
for task in 0 1 2; do
    SLURM_PROCID=$task "$@" & tasks[task]=$!
done
[[ -z ${SIGNAL:-} ]] || { sleep 1; kill "-$SIGNAL" "${tasks[@]}"; }
for task in 0 1 2; do
    wait "${tasks[task]}"
    code=$?
    ((code > highest)) && highest=$code
done
exit "$highest"
"""
# What a task's word of CODES says: it ends with this code, it is killed, or its whole node is.
TRAIN = """
[[ $SLURM_PROCID != 0 ]] || { echo "train $*"; [[ -z ${SAVES:-} ]] || mkdir -p "$SAVES"; }
read -ra words <<<"$DOES"
case ${words[SLURM_PROCID]} in
    killed) kill -9 $$ ;;
    lost) kill -9 "$PPID" $$ ;;
    saves) trap 'sleep 1; exit 143' TERM; sleep 30 & wait ;;
    *) exit "${words[SLURM_PROCID]}" ;;
esac
"""


def slurm(folder, does, **environment):
    """What the job says, its code, and whether it was queued again, when its three tasks do this."""
    for name, body in {"srun": SRUN, "train": TRAIN, "scontrol": 'echo "scontrol $*"'}.items():
        stand_in(folder, name, body)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "12", "PYTHON": "train", "DOES": does, **environment}
    command = ["bash", str(CLUSTER / "slurm.sbatch"), "configs/pdtr.py", str(folder / "w"), "--config.seed=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"train -m launch.train --config=configs/pdtr.py --workdir={folder}/w --config.seed=3" in done.stdout
    return done.stdout + done.stderr, done.returncode, "scontrol requeue 12" in done.stdout


@pytest.mark.parametrize(
    "does, code, again",
    [
        ("0 0 0", 0, False),
        ("143 143 143", 143, True),
        ("75 75 killed", 137, True),
        ("75 lost 75", 137, True),
        ("lost lost lost", 137, True),
        ("143 75 143", 143, True),
        ("75 1 75", 1, False),  # an error of a process's own, which the others see as its loss
        ("killed 1 75", 1, False),
        ("75 2 75", 2, False),
    ],
)
def test_slurm_queues_again_what_can_go_on(tmp_path, does, code, again):
    assert slurm(tmp_path, does)[1:] == (code, again)


def test_slurm_does_not_queue_for_ever_what_never_saves(tmp_path):
    states = tmp_path / "w/checkpoints/states"
    again = lambda **environment: slurm(tmp_path, "75 killed 75", **environment)[2]
    assert [again(), again(), again(SAVES=str(states / "2")), again(), again()] == [True] * 5
    said, code, queued = slurm(tmp_path, "75 killed 75", SAVES=str(states / "9.orbax-checkpoint-tmp"))
    assert (code, queued) == (137, False) and "without a new checkpoint 3 times in a row" in said


def test_slurm_s_tasks_hand_the_signal_to_their_training_and_leave_with_it(tmp_path):
    assert slurm(tmp_path, "saves saves saves", SIGNAL="TERM")[1:] == (143, True)
    assert (tmp_path / "w/slurm/12/2").read_text() == "143\n"


def test_xpk_is_given_the_whole_command(tmp_path):
    stand_in(tmp_path, "xpk", "printf '%s\\n' \"$@\"")
    where = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "IMAGE": "i", "TPU_TYPE": "v5p-128", "STORAGE": "s"}
    where["SLICES"] = "2"
    flag = "--config.schedule=('t2i','edit')"
    done = run("xpk.sh", "name", "configs/pdtr.py", "/w", flag, folder=tmp_path, **where)
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    assert given[:2] == ["workload", "create"] and "--num-slices=2" in given and "--workload=name" in given
    assert f"--restart-on-exit-codes={LOST_PEER}" in given and "--storage=s" in given
    assert "--termination-grace-period-seconds=600" in given
    command = next(line for line in given if line.startswith("--command=")).removeprefix("--command=")
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert (
        words[:4] == ["exec", "python", "-m", "launch.train"]
        and "--config.parallel.slices=2" in words
        and flag in words
    )
    missing = run("xpk.sh", "name", "configs/pdtr.py", "/w", folder=tmp_path, **{**where, "IMAGE": ""})
    assert missing.returncode != 0 and "Dockerfile.tpu" in missing.stderr
    address = run("xpk.sh", "name", "configs/pdtr.py", "gs://b/w", folder=tmp_path, **where)
    assert address.returncode == 2 and "gs://b/w is an address" in address.stderr and not address.stdout
