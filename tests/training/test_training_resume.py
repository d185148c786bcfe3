"""A run that is killed and continued ends with the same bits as one that is not."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import toy_stage
from toy_stage import contents

from unipic2_jax.training import loop
from unipic2_jax.training.metrics import read_evaluations, read_rows

FIELDS = {"save_every": 1, "eval_every": 5}
ROOT = Path(__file__).resolve().parents[2]
GRACE = 1.0  # seconds
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


def start(processes, workdir, trouble=None, fields=FIELDS, **options):
    arguments = (str(workdir), fields, trouble or {})
    process = processes.Process(target=toy_stage.child, args=arguments, kwargs=options, daemon=True)
    process.start()
    return process


def wait_until(condition, process):
    """Returns soon after it is so, or when the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


def complete(states):
    """The numbers of whole checkpoints: those that have got their name."""
    return {int(path.name) for path in states.glob("*") if path.name.isdigit()}


def incomplete(states):
    """Names of checkpoints that are being written, or were."""
    return {path.name for path in states.glob("*") if not path.name.isdigit()}


def test_killed_inside_a_step_of_each_stage(processes, reference, tmp_path):
    for kill_at in (4, 9, 2):
        process = start(processes, tmp_path / "run", {"kill_at": kill_at})
        process.join(PATIENCE)
        assert process.exitcode in (-signal.SIGKILL, 0)
    toy_stage.run(tmp_path / "run", **FIELDS)
    assert contents(tmp_path / "run") == reference


def test_killed_at_twenty_random_moments(processes, tmp_path):
    """Every step saves, in half of the processes in the background; half of the kills come when a save has begun."""
    fields = {**FIELDS, "steps": 60, "eval_every": 10, "ballast": 1 << 21}
    toy_stage.run(tmp_path / "whole", **fields)
    workdir, rng, in_save = tmp_path / "run", np.random.default_rng(0), {False: 0, True: 0}
    states = workdir / "checkpoints" / "states"
    newest = lambda: max(complete(states), default=0)
    for number in range(20):
        before, asynchronous = newest(), bool(number % 2)
        process = start(processes, workdir, fields=fields, asynchronous=asynchronous)
        if number % 4 == 3:  # while it starts, most often
            time.sleep(rng.uniform(0, 1))
        else:
            wait_until(lambda before=before: newest() > before, process)
        if number % 4 < 2:
            wait_until(lambda: incomplete(states), process)
            time.sleep(rng.uniform(0, 0.01))
        else:
            time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        in_save[asynchronous] += bool(incomplete(states))
    print(f"{in_save} of 20 kills fell into a save, the last after step {newest()} of 67")
    assert min(in_save.values()) >= 3
    toy_stage.run(workdir, **fields)
    assert contents(workdir) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_pdtr_is_killed_several_times(tmp_path):
    """The real trainer, from its command line."""
    command = [sys.executable, "-m", "launch.train", "--config=configs/pdtr.py:tiny,smoke"]
    for stage in ("edit", "t2i"):
        command += [f"--config.stages.{stage}.steps=5", f"--config.stages.{stage}.save_every=1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    begin = lambda name: subprocess.Popen([*command, f"--workdir={tmp_path / name}"], cwd=ROOT, env=environment)
    assert begin("whole").wait(PATIENCE) == 0
    states, rng = tmp_path / "run/checkpoints/states", np.random.default_rng(0)
    newest = lambda: max(complete(states), default=0)
    for _ in range(4):
        before, process = newest(), begin("run")
        while process.poll() is None and newest() <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert begin("run").wait(PATIENCE) == 0
    found, wanted = (exported(tmp_path / name) for name in ("run", "whole"))
    assert found == wanted


def exported(workdir):
    """The model's files, and what was recorded besides times."""
    timed = ("seconds", "samples_per_second", "model_tflops")
    rows = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_rows(workdir / "metrics.jsonl")]
    files = {path.relative_to(workdir): path.read_bytes() for path in (workdir / "export").rglob("*") if path.is_file()}
    return rows, read_evaluations(workdir), files


def test_sigterm_saves_and_says_so(processes, reference, tmp_path):
    process = start(processes, tmp_path / "run", {"term_at": 7})
    process.join(PATIENCE)
    assert process.exitcode == 128 + signal.SIGTERM
    assert (tmp_path / "run/checkpoints/states/8").exists()
    toy_stage.run(tmp_path / "run", **FIELDS)
    assert contents(tmp_path / "run") == reference


RECIPE = """
import toy_stage

def get_config(arg=''):
    return toy_stage.toy_config(save_every=1)
"""


@pytest.mark.parametrize(
    "trouble, flag, code, words",
    [
        ({"term_at": 7}, "seed=0", 128 + signal.SIGTERM, "Stopped by a signal after step 8 of 'first'"),
        ({}, "stages.first.nan_at=7", 1, "Step 7 of stage 'first' gave loss = nan"),
        ({"error_at": 7}, "seed=0", 1, "ZeroDivisionError"),
    ],
)
def test_however_a_run_ends_its_process_waits_for_no_compilation(processes, tmp_path, trouble, flag, code, words):
    """A compilation of a minute is under way, and two more are to come; what was recorded is written."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    flags = [f"--config={tmp_path}/recipe.py", f"--workdir={tmp_path}/run", f"--config.{flag}"]
    arguments = (flags, {"compile_at": 6, **trouble}, tmp_path / "said")
    process = processes.Process(target=toy_stage.command, args=arguments, daemon=True)
    process.start()
    states = tmp_path / "run/checkpoints/states"
    wait_until(lambda: 7 in complete(states), process)
    saved = time.monotonic()
    process.join(PATIENCE)
    assert time.monotonic() - saved < toy_stage.COMPILE / 2
    said = (tmp_path / "said").read_text()
    assert process.exitcode == code and words in said, said
    steps = max(complete(states))
    assert steps == (8 if code > 1 else 7)
    assert read_rows(tmp_path / "run/metrics.jsonl")[-1]["step"] == steps
    events = b"".join(path.read_bytes() for path in (tmp_path / "run/tensorboard").iterdir())
    assert events.count(b"first/loss") == steps


@pytest.mark.parametrize(
    "trouble, fields, saved",
    [
        ({"hang_at": 7}, {"save_every": 1}, 7),
        # An evaluation begins with everything saved.
        ({"hang_in_evaluation": 5}, {"save_every": 4}, 5),
    ],
)
def test_sigterm_ends_what_python_cannot_interrupt_when_all_is_saved(
    processes, reference, tmp_path, trouble, fields, saved
):
    workdir, fields = tmp_path / "run", {**FIELDS, **fields}
    process = start(processes, workdir, trouble, fields, output=tmp_path / "said", grace=GRACE)
    wait_until((workdir / "hanging").exists, process)
    signalled = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == 128 + signal.SIGTERM
    assert time.monotonic() - signalled < 30
    assert "Ended by a signal, with all steps saved" in (tmp_path / "said").read_text()
    assert max(complete(workdir / "checkpoints/states")) == saved
    toy_stage.run(workdir, **fields)
    assert contents(workdir) == reference


def test_sigterm_waits_for_unsaved_steps_and_a_second_one_does_not(processes, reference, tmp_path):
    workdir, fields = tmp_path / "run", {**FIELDS, "save_every": 3}
    process = start(processes, workdir, {"hang_at": 8}, fields, output=tmp_path / "said", grace=GRACE)
    wait_until((workdir / "hanging").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(3 * GRACE)
    assert process.is_alive()
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < deadline:  # the first may have been noticed late
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, signal.SIGTERM)
        process.join(3 * GRACE)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "Ended at once by a second signal" in (tmp_path / "said").read_text()
    assert max(complete(workdir / "checkpoints/states")) == 6
    toy_stage.run(workdir, **fields)
    assert contents(workdir) == reference


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


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_stops_with_a_sentence_and_loses_nothing(processes, tmp_path, capsys, asynchronous):
    fields = {**FIELDS, "ballast": 1 << 16}
    output, trouble = tmp_path / "said", {"full_at": 4}
    process = start(processes, tmp_path / "run", trouble, fields, output=output, asynchronous=asynchronous)
    process.join(PATIENCE)
    said = output.read_text()
    assert process.exitcode == 1 and "TrainingError: A checkpoint could not be written" in said, said
    # In the background the fourth was still being written, or was not; the sentence knows.
    newest = max(complete(tmp_path / "run/checkpoints/states"))
    assert newest in ((3, 4) if asynchronous else (4,))
    assert f"states/{newest}: make room there" in said.splitlines()[-1]
    toy_stage.run(tmp_path / "run", **fields)
    assert f"Continuing after step {newest} of" in capsys.readouterr().err
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


def test_training_goes_on_while_a_checkpoint_is_read_back(tmp_path, monkeypatch):
    from unipic2_jax.training.checkpoints import Checkpoints

    stepped, waited, verify, step = threading.Event(), [], Checkpoints._damaged, toy_stage.ToyStage.step

    def read(self, number):
        if number == 8:
            waited.append(stepped.wait(60))
        return verify(self, number)

    def run(self, state, at):
        if (self.context.index, at) == (0, 8):
            stepped.set()
        return step(self, state, at)

    monkeypatch.setattr(Checkpoints, "_damaged", read)
    monkeypatch.setattr(toy_stage.ToyStage, "step", run)
    toy_stage.run(tmp_path / "run", **FIELDS)
    assert waited == [True]
    assert complete(tmp_path / "run/checkpoints/states") == {17, 18, 19}


def test_a_checkpoint_is_not_read_inside_of_a_save(tmp_path, monkeypatch):
    """Orbax has one number for what it does in a process; a load inside a save changes it, and the save writes too early."""
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    from unipic2_jax.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"w": jnp.ones(3)}, {})
    assert checkpoints.readings[1].result() is None
    order, found, readers = [], [], []

    def after(owner, name, act):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (original(*args, **kwargs), act())[0])

    def read_beside():
        order.append("save")
        readers.append(threading.Thread(target=lambda: found.append(checkpoints._damaged(1))))
        readers[0].start()
        readers[0].join(1.0)  # it would have read

    after(ocp.AsyncCheckpointer, "synchronize_next_awaitable_signal_operation_id", read_beside)
    after(ocp.StandardCheckpointer, "close", lambda: order.append("saved"))
    after(ocp.v1, "load", lambda: order.append("load"))
    checkpoints.save_params(1, {"w": jnp.ones(3)})
    readers[0].join(60)
    assert found == [None] and (tmp_path / "params/1").is_dir()
    assert order == ["save", "saved", "load"]
    checkpoints.close()


def test_sigterm_does_not_wait_for_a_checkpoint_to_be_read_back(processes, reference, tmp_path):
    """Nor does a kill there: the older checkpoints are left, and what is continued from has been read."""
    workdir = tmp_path / "run"
    process = start(processes, workdir, {"term_at": 8, "read_for": 60.0}, output=tmp_path / "said")
    wait_until(lambda: 8 in complete(workdir / "checkpoints/states"), process)
    saved = time.monotonic()
    process.join(PATIENCE)
    assert time.monotonic() - saved < 30
    assert process.exitcode == 128 + signal.SIGTERM
    assert complete(workdir / "checkpoints/states") == {5, 6, 7, 8, 9}
    toy_stage.run(workdir, **FIELDS)
    assert contents(workdir) == reference


def test_which_checkpoints_stay(tmp_path):
    config = toy_stage.toy_config(**FIELDS)
    config.keep_checkpoints, config.keep_every = 2, 6
    loop.run(config, tmp_path / "run", load=toy_stage.load, save=toy_stage.save)
    assert complete(tmp_path / "run/checkpoints/states") == {6, 12, 18, 19}


def test_another_configuration_is_refused(tmp_path):
    toy_stage.run(tmp_path / "run")
    with pytest.raises(loop.config_lib.ConfigError, match=r"config.seed = 0, and this command asks for 3"):
        toy_stage.run(tmp_path / "run", seed=3)
    with pytest.raises(loop.config_lib.ConfigError, match=r"config.stages.first.nan_at = -1"):
        toy_stage.run(tmp_path / "run", nan_at=13)
    toy_stage.run(tmp_path / "run", save_every=4)
    # A field that came later stands for its default in what was saved before.
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    for stage in saved["stages"].values():
        del stage["nan_at"]
    path.write_text(json.dumps(saved))
    toy_stage.run(tmp_path / "run")
    path.write_text(json.dumps(saved))
    with pytest.raises(
        loop.config_lib.ConfigError, match=r"config.stages.first.nan_at = -1, and this command asks for 13"
    ):
        toy_stage.run(tmp_path / "run", nan_at=13)


def longer(workdir, **steps):
    """The toys' run with other steps, whose learning rates are constant."""
    config = toy_stage.toy_config(**FIELDS)
    for name, count in steps.items():
        config.stages[name].steps = count
    config.stages.second.optimizer.schedule = "constant"
    return loop.run(config, workdir, load=toy_stage.load, save=toy_stage.save)


def test_a_finished_run_goes_on_when_steps_are_raised(tmp_path, capsys):
    whole = contents(longer(tmp_path / "whole", second=11).parent)
    longer(tmp_path / "run")
    first = contents(tmp_path / "run")["export"]
    capsys.readouterr()
    longer(tmp_path / "run", second=11)
    said = capsys.readouterr().err
    assert "This command has config.stages.second.steps = 11 instead of 7.\n" in said
    assert "Continuing after step 7 of stage 'second'" in said and "stays in" in said
    found = contents(tmp_path / "run")
    assert (found["export"], found["state"]) == (whole["export"], whole["state"])
    # The end at step 7 was evaluated too.
    assert all(row in whole["rows"] or (row["kind"], row["step"]) == ("evaluation", 7) for row in found["rows"])
    assert [r for r in found["rows"] if r["kind"] == "train"] == [r for r in whole["rows"] if r["kind"] == "train"]
    with np.load(tmp_path / "run/export_19/params.npz") as arrays:
        assert {name: arrays[name].tobytes() for name in arrays.files} == first != whole["export"]
    # The same command once more finds nothing to do.
    longer(tmp_path / "run", second=11)
    assert contents(tmp_path / "run") == found and not (tmp_path / "run/export_23").exists()


def test_steps_that_cannot_be_changed_are_one_sentence(tmp_path):
    longer(tmp_path / "run")
    ours = loop.config_lib.ConfigError
    with pytest.raises(
        ours, match=r"stage 'second' has begun with what 'first' gave.* config.stages.first.steps = 13 instead of 12"
    ):
        longer(tmp_path / "run", first=13)
    with pytest.raises(ours, match=r"stage 'second' has begun, .*second.steps = 6 instead of 7; give 7 or more"):
        longer(tmp_path / "run", second=6)


def test_the_running_stage_gets_more_steps_and_one_to_come_any(processes, tmp_path, capsys):
    started = start(processes, tmp_path / "run", {"kill_at": 6}, {**FIELDS, "steps": 12})
    started.join(PATIENCE)
    config = toy_stage.toy_config(**FIELDS)
    config.stages.first.steps, config.stages.second.steps = 14, 3
    loop.run(config, tmp_path / "run", load=toy_stage.load, save=toy_stage.save)
    said = capsys.readouterr().err
    assert "first.steps = 14 instead of 12." in said
    assert "second.steps = 3 instead of 7; its learning rate follows 'cosine' of the 3 from here on." in said
    loop.run(config, tmp_path / "whole", load=toy_stage.load, save=toy_stage.save)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("seed", [-1, 2**32 + 5, -(2**70)])
def test_seeds_of_any_integer(tmp_path, seed):
    toy_stage.run(tmp_path / "any", seed=seed)
    toy_stage.run(tmp_path / "folded", seed=seed % 2**32)
    assert contents(tmp_path / "any") == contents(tmp_path / "folded")
    toy_stage.run(tmp_path / "folded", seed=seed)  # the same run


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
