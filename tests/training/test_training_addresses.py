"""Runs whose workdir, model and data are at addresses: killed, continued elsewhere, and equal to those in a folder."""

import multiprocessing

import jax
import pytest
import toy_stage
from toy_stage import contents

from unipic2_jax.core.errors import ConfigError, TrainingError
from unipic2_jax.training import loop, workdir

FIELDS = {"save_every": 1, "eval_every": 5}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    toy_stage.run(folder, **FIELDS)
    return contents(folder), (folder / "report.md").read_text()


def test_a_run_killed_at_an_address_continues_on_another_machine(reference, tmp_path, monkeypatch):
    """Killed by SIGKILL in both stages; each start has an empty cache, as another machine has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_stage"])
    store = tmp_path / "store"
    for start, kill_at in enumerate((4, 11, 3)):
        monkeypatch.setenv("UNIPIC2_CACHE", str(tmp_path / f"machine{start}"))
        trouble = {"kill_at": kill_at}
        process = context.Process(target=toy_stage.child, args=(f"file://{store}/run", FIELDS, trouble), daemon=True)
        process.start()
        process.join(300)
        assert process.exitcode == -9
    monkeypatch.setenv("UNIPIC2_CACHE", str(tmp_path / "last"))
    assert toy_stage.run(f"file://{store}/run", **FIELDS) == f"file://{store}/run/export"
    assert contents(store / "run") == reference[0]
    assert (store / "run" / "report.md").read_text() == reference[1]
    assert (store / "run" / "curves.png").is_file() and list((store / "run" / "tensorboard").iterdir())
    assert not list((tmp_path / "last/runs").rglob("checkpoints"))  # the local copy is gone


def test_an_asynchronous_save_goes_there_too(reference, tmp_path, memory, monkeypatch):
    def asynchronous(*arguments, **options):
        return made(*arguments, **{**options, "asynchronous": True})

    made = loop.Checkpoints
    monkeypatch.setattr(loop, "Checkpoints", asynchronous)
    toy_stage.run("memory://bucket/run", **FIELDS)
    memory.get("/bucket/run", str(tmp_path / "run"), recursive=True)
    assert contents(tmp_path / "run") == reference[0]


def test_a_run_that_ends_by_an_error_continues(reference, tmp_path, memory):
    toy_stage.TROUBLE["error_at"] = 4
    try:
        with pytest.raises(ZeroDivisionError):
            toy_stage.run("memory://bucket/run", **FIELDS)
    finally:
        toy_stage.TROUBLE.clear()
    toy_stage.run("memory://bucket/run", **FIELDS)
    memory.get("/bucket/run", str(tmp_path / "run"), recursive=True)
    assert contents(tmp_path / "run") == reference[0]


def test_what_is_wrong_with_an_address_is_said_before_any_work(memory, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"^--workdir: The protocol of memry://b/run is unknown to fsspec; did you mean"
    ):
        toy_stage.run("memry://b/run")
    with pytest.raises(ConfigError, match="whose slashes were lost; give it as a string"):
        toy_stage.run(workdir.Path("gs://bucket/run"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sentence = "Several processes cannot write their checkpoints to memory://bucket/run"
    with pytest.raises(ConfigError, match=sentence), workdir.opened("memory://bucket/run"):
        pass


def test_a_store_that_fails_ends_the_run_with_a_sentence(memory, monkeypatch):
    put = type(memory).pipe_file

    def refuse(self, path, *arguments, **options):
        if "/states/3/" in path:
            raise RuntimeError("quota")
        return put(self, path, *arguments, **options)

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    with pytest.raises(
        TrainingError, match=r"memory://bucket/run cannot be written \(quota\).*The same command continues"
    ):
        toy_stage.run("memory://bucket/run", **FIELDS)
    monkeypatch.undo()


def test_a_tiny_recipe_at_an_address_has_the_bits_of_one_in_a_folder(tmp_path, memory, monkeypatch):
    """Model and workdir at addresses, interrupted after two of four steps."""
    from configs.finetune import get_config
    from unipic2_jax.core.assets import TINY
    from unipic2_jax.training.metrics import Metrics, read_rows

    config = get_config("tiny,smoke")
    with config.unlocked():
        config.stages.finetune.update({"save_every": 1, "log_every": 1})
        config.stages.finetune.evaluations = config.stages.finetune.validation = {}
    loop.run(config, tmp_path / "here")
    memory.put(TINY, "/bucket/tiny", recursive=True)
    config.init = "memory://bucket/tiny"
    train = Metrics.train

    def interrupted(self, place, *values):
        train(self, place, *values)
        if place["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Metrics, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, "memory://bucket/run")
    monkeypatch.setattr(Metrics, "train", train)
    assert loop.run(config, "memory://bucket/run") == "memory://bucket/run/export"
    memory.get("/bucket/run", str(tmp_path / "there"), recursive=True)
    for name in (
        "export/transformer/diffusion_pytorch_model.safetensors",
        "stages/finetune/pytorch_lora_weights.safetensors",
    ):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    rows = [read_rows(tmp_path / where / "metrics.jsonl") for where in ("here", "there")]
    losses = [[row["loss"] for row in found if row["kind"] == "train"] for found in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 4
