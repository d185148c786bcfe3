"""The loop that every run goes through: stages in order, checkpoints, evaluations, records, export."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from ml_collections import ConfigDict
from tqdm import tqdm

from unipic2_jax.core.errors import TrainingError, TrainingPaused
from unipic2_jax.data.prompts import look_through
from unipic2_jax.models.attention import check_implementation
from unipic2_jax.models.model import Model
from unipic2_jax.parallel.compat import use_mesh
from unipic2_jax.parallel.processes import end, is_lost_peer, is_main, max_over_processes, wait_for_all
from unipic2_jax.parallel.streaming import streamed
from unipic2_jax.training import config as config_lib
from unipic2_jax.training.checkpoints import Checkpoints
from unipic2_jax.training.curves import draw_curves
from unipic2_jax.training.metrics import Metrics, read_evaluations
from unipic2_jax.training.report import write_report
from unipic2_jax.training.setup import (
    config_mesh,
    load_model,
    save_model,
    settled,
    tell,
    use_compilation_cache,
)
from unipic2_jax.training.signals import Signals
from unipic2_jax.training.stage import Stage, StageContext, stage_class
from unipic2_jax.training.workdir import Workdir, opened
from unipic2_jax.weights.precision import PRECISIONS

Load = Callable[[ConfigDict, jax.sharding.Mesh], Model]
Save = Callable[[Model, Path, Collection[str]], None]

CURVES_EVERY = 60.0  # seconds; drawing takes about one


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    mesh: jax.sharding.Mesh | None = None,
    load: Load | None = None,
    save: Save | None = None,
    split: Callable[[ConfigDict, Callable[[str], None]], ConfigDict] | None = None,
    opening: Callable[[ConfigDict, jax.sharding.Mesh, str], str] | None = None,
    own_process: bool = False,
) -> Path | str:
    """Runs the stages of `config.schedule` in `workdir`, continuing what is there, and exports the final model.

    A step is a function of (state, step number), checkpoints hold the whole state, and the folder of a finished
    stage is never needed again, so the same command after a kill at any moment ends with the same bits.

    Args:
      config: see `config.make_config`; it is validated before anything else.
      workdir: receives config.json, metrics.jsonl, tensorboard/, samples/, evaluations/, checkpoints/, curves.png,
        report.md and export/ (plus export/ extras of each stage under stages/); a folder, or an address (`training.workdir`).
      mesh: devices; all of them in the shape of `config.parallel` by default.
      load, save: how the model is made from the configuration, and written, with the paths of the leaves that are not as they
        were read; as its kind does it by default.
      split: what puts a split in place of `parallel.preset='auto'` where there are several accelerators: `perf.split.resolved`.
      opening: what is said before a model is read, of the configuration, its mesh and the workdir: `perf.opening.table`.
      own_process: the process is for this run alone, so that a signal may end it where Python cannot be interrupted, and
        without waiting for what still compiles.

    Returns:
      The folder, or the address, of the exported model.

    Raises:
      ConfigError: for a wrong configuration, or one that differs from that of the run in `workdir`.
      TrainingError: when a metric is not finite.
      SystemExit: with 128 + the signal's number after SIGTERM or SIGINT, when the state has been saved.
    """
    config = config_lib.validate(config)
    # Every split shares a batch over all devices, so that stages are checked before one is chosen, which takes a while.
    least = config_lib.unplanned(config)
    _check(least, mesh or config_mesh(least))
    try:
        with opened(workdir) as files:
            _check_files(least, files)
            use_compilation_cache(files.folder)
            config = settled(config, split) if mesh is None else least
            mesh = mesh or config_mesh(config)
            if opening is not None and is_main():
                tell(opening(config, mesh, files.shown))
            load, save = load or load_model, save or functools.partial(save_model, config=config)
            with use_mesh(mesh):
                export = _Run(config, files, mesh, load, save, own_process).go()
            return export if files.mirror is None else files.name(export)
    except SystemExit as left:
        if own_process:
            end(left.code)
        raise


def _check(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Everything that can be known to be wrong of a configuration before a model is read.

    Raises:
      ConfigError: one sentence about the first thing that is.
    """
    with use_mesh(mesh):
        try:
            check_implementation(config.attention)
        except ValueError as error:
            raise config_lib.ConfigError(f"config.{error}") from error
    for name in config.schedule:
        with _told_of(name):
            stage_class(config.stages[name].kind).check(config.stages[name], mesh)


def _check_files(config: ConfigDict, files: Workdir) -> None:
    """The same of what is in the workdir, and of what the configuration names.

    Raises:
      ConfigError: one sentence about the first thing that is.
    """
    for sentence in config_lib.check_same_run(config, files.folder / "config.json"):
        tell(sentence)
    # Pictures of prompts come last, since there can be many of them.
    for name in config.schedule:
        with _told_of(name):
            for source in stage_class(config.stages[name].kind).prompt_sources(config.stages[name]):
                look_through(source, files.folder / "looked_through.txt")


@contextlib.contextmanager
def _told_of(name: str) -> Iterator[None]:
    """What is wrong inside is told as being so of the stage of this name."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise config_lib.ConfigError(f"config.stages.{name}: {error}") from error


class _Run:
    """One call of `run`: what its steps share. `go` is the whole of it, and methods follow in the order in which it needs them."""

    def __init__(
        self,
        config: ConfigDict,
        files: Workdir,
        mesh: jax.sharding.Mesh,
        load: Load,
        save: Save,
        own_process: bool,
    ):
        self.config, self.files, self.mesh, self.load, self.save_model = config, files, mesh, load, save
        self.workdir = files.folder
        self.own_process = own_process
        self.names = list(config.schedule)
        # The model that the current stage's is made of, and what stages before trained that is no part of it.
        self.initial, self.carried = self.load_model(config.stages[self.names[0]].model), {}
        self.initial_name = config.stages[self.names[0]].model
        self.offsets = [sum(config.stages[n].steps for n in self.names[:i]) for i in range(len(self.names))]
        self.drawn = time.monotonic()
        self.checkpoints = Checkpoints(
            files.checkpoints, config.keep_checkpoints, config.keep_every, log=self.say, written=files.send
        )

    def say(self, sentence: str) -> None:
        """A line for the person who watches, above the progress bar; of several processes one speaks."""
        if is_main():
            tqdm.write(sentence, file=sys.stderr)

    def go(self) -> Path:
        """Runs what is left of the schedule; returns the folder of the exported model."""
        stage, step, state = self.begin()
        model = None
        with self.recorded(), Signals(self.saving, self.own_process) as self.signals:
            for index in range(stage.context.index, len(self.names)):
                # What a stage needs of those before is saved; in memory there is one full-size model at a time.
                model = None
                stage = stage or self.stage_at(index)
                state = stage.init() if state is None else state
                model = self.complete(stage, step, state)
                stage, step, state = None, 0, None
        self.checkpoints.close()
        return self.export(model)

    def saving(self) -> bool:
        """Whether a checkpoint is being written, or sent."""
        return self.checkpoints.saving() or self.files.busy()

    def begin(self) -> tuple[Stage, int, Any]:
        """The stage to go on with, from which step, and the state of its newest checkpoint; None where there is none."""
        stage, step, state = None, 0, None

        def like(record: dict[str, Any]) -> Any:
            nonlocal stage
            stage = self.stage_at(record["stage_index"])
            return stage.saved_as(stage.init(), record.get("checksums", {}).keys())

        if restored := self.checkpoints.restore_newest(like):
            record, state = restored[0], stage.restored(restored[1])
            step = record["step"]
            self.say(f"Continuing after step {step} of stage '{stage.context.name}' in {self.files.shown}.")
            self.put_aside(stage.context.index, step)
        stage = stage or self.stage_at(0)
        # Only now, so that a mistake which shows up while starting can be corrected in the same folder.
        if is_main():
            config_lib.write_config(self.config, self.workdir / "config.json")
        self.metrics = Metrics(self.workdir, self.offsets[stage.context.index] + step, writes=is_main())
        return stage, step, state

    def put_aside(self, first: int, step: int) -> None:
        """Gives the export of a run that was finished, and now has more steps, a name of its own."""
        export = self.workdir / "export"
        left = self.config.stages[self.names[first]].steps - step or len(self.names) - 1 - first
        if not is_main() or not left or not export.exists():
            return
        kept = export.with_name(f"export_{self.offsets[first] + step}")
        export.rename(kept)
        self.say(f"The model after {self.offsets[first] + step} steps stays in {self.files.name(kept)}.")

    def load_model(self, name: str | None) -> Model:
        """The run's model, or the one of this name, as it was before any training."""
        try:
            return self.load(config_lib.model_config(self.config, name), self.mesh)
        except ValueError as error:
            raise config_lib.ConfigError(str(error)) from error

    def stage_at(self, index: int) -> Stage:
        """Stage `index`, on its model with all that stages before it have trained, by name."""
        name = self.names[index]
        if (model := self.config.stages[name].model) != self.initial_name:
            self.initial = None  # before another one is read
            self.initial, self.initial_name = self.load_model(model), model
        params, self.carried = self.checkpoints.load_params(index, self.initial.params, self.mesh)
        context = StageContext(
            name,
            index,
            self.config.seed,
            self.mesh,
            self.workdir,
            next_lora=self.next_lora(index),
            log=self.say,
            precision=PRECISIONS[self.config.precision],
            gather=self.config.parallel.gather,
        )
        kind = stage_class(self.config.stages[name].kind)
        return kind(self.config.stages[name], self.initial.replace(params=params), context)

    def next_lora(self, index: int) -> ConfigDict | None:
        """The LoRA fields of the stage after `index`, when it goes on with the LoRA of that one."""
        if index + 1 == len(self.names):
            return None
        after = self.config.stages[self.names[index + 1]]
        return after.lora if stage_class(after.kind).continues_lora(after) else None

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """However the run leaves, what is being written ends well and metrics are closed."""
        try:
            yield
        except Exception as error:
            if not is_lost_peer(error):
                with contextlib.suppress(Exception):
                    self.checkpoints.wait()
            raise
        finally:
            self.metrics.close()

    def complete(self, stage: Stage, step: int, state: Any) -> Model:
        """Takes a stage from `step` to its end, and leaves there what the next one needs."""
        stage.release()
        try:
            return self.finish(stage, self.train(stage, step, state))
        finally:
            stage.close()

    def train(self, stage: Stage, step: int, state: Any) -> Any:
        """Takes the stage from `step` to its end; saves, evaluates and records on the way."""
        config, place, timeline = stage.config, lambda: self.place(stage, step), stage.context.timeline
        hidden = None if is_main() else True  # None: shown on a terminal
        bar = tqdm(total=config.steps, initial=step, desc=stage.context.name, disable=hidden, dynamic_ncols=True)
        with bar:
            while True:
                timeline.begin()
                if max_over_processes(self.signals.received):
                    self.stop(place(), state)
                if step % config.save_every == 0 or step == config.steps:
                    with timeline.span("save"):
                        self.save(place(), state)
                if step in (0, config.steps) or (config.eval_every and step % config.eval_every == 0):
                    with timeline.span("evaluate"):
                        self.save(place(), state)  # an evaluation can take long, and can then be left at once
                        self.evaluate(stage, state, place())
                if step == config.steps:
                    return state
                started = time.perf_counter()
                try:
                    state, metrics = stage.step(state, step)
                except TrainingPaused:
                    self.save(place(), state, last=True)
                    raise
                metrics = {name: float(value) for name, value in metrics.items()}
                metrics["seconds_step"] = time.perf_counter() - started
                self.check_finite(stage, step, metrics)
                step += 1
                self.signals.unsaved = True
                if step % config.log_every == 0 or step == config.steps:
                    self.metrics.train(place(), metrics, timeline.spans)
                    self.files.send_sometimes()
                    bar.set_postfix(_shown(metrics), refresh=False)
                bar.update()
                self.checkpoints.read_back()

    def place(self, stage: Stage, step: int) -> dict[str, Any]:
        """Where the run is, as checkpoints and metrics say it."""
        index = stage.context.index
        return {
            "stage": stage.context.name,
            "stage_index": index,
            "step": step,
            "total_step": self.offsets[index] + step,
        }

    def save(self, place: dict[str, Any], state: Any, *, last: bool = False) -> None:
        """Saves, unless no step was taken since; `last`: the run leaves then."""
        if self.signals.unsaved:
            self.metrics.flush()
            self.files.before_checkpoint()
            self.checkpoints.save(place["total_step"], state, {**place, "seed": self.config.seed}, last=last)
            self.signals.unsaved = False

    def evaluate(self, stage: Stage, state: Any, place: dict[str, Any]) -> None:
        """Evaluates unless this evaluation is recorded already."""
        record = self.metrics.record_path(place["stage_index"], place["stage"], place["step"])
        if max_over_processes(is_main() and record.exists()):
            return
        result = self.known_already(stage, place) if is_main() else None
        if not max_over_processes(result is not None):
            result = stage.evaluate(state, place["step"])
        if not is_main():
            return
        self.metrics.evaluation(place, result)
        # Tags are left to the report.
        shown = {name: float(value) for name, value in result.get("metrics", {}).items() if name.count("/") < 2}
        if shown:
            values = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.say(f"{place['stage']}, step {place['step']}: {values}")
        if time.monotonic() - self.drawn > CURVES_EVERY:
            draw_curves(self.workdir)
            self.drawn = time.monotonic()

    def known_already(self, stage: Stage, place: dict[str, Any]) -> dict[str, Any] | None:
        """What the stage before ended with, when it was measured on the same evaluations: this stage starts there."""
        index = place["stage_index"]
        if place["step"] or not index or not stage.config.get("evaluations"):
            return None
        before = self.config.stages[self.names[index - 1]]
        if before.get("evaluations") != stage.config.evaluations or before.model != stage.config.model:
            return None
        ended = (index - 1, before.steps)
        found = [r for r in read_evaluations(self.workdir) if (r["stage_index"], r["step"]) == ended]
        return {part: found[0][part] for part in ("metrics", "scores")} if found else None

    def check_finite(self, stage: Stage, step: int, metrics: dict[str, float]) -> None:
        """Stops the run at the first value that is not a number; the state of that step is never saved."""
        wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if not wrong:
            return
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        good = (
            f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "there is no checkpoint yet"
        )
        named = ", ".join(f"{name} = {value}" for name, value in wrong.items())
        raise TrainingError(
            f"Step {step} of stage '{stage.context.name}' gave {named}; {good}: "
            "lower the learning rate or inspect that step's data, then run the same command in a new workdir."
        )

    def stop(self, place: dict[str, Any], state: Any) -> None:
        """Saves and leaves after a signal."""
        self.save(place, state, last=True)
        self.checkpoints.wait()
        self.files.complete()
        self.say(f"Stopped by a signal after step {place['step']} of '{place['stage']}'; the same command continues.")
        raise SystemExit(128 + max_over_processes(self.signals.received))

    def finish(self, stage: Stage, state: Any) -> Model:
        """Ends a stage: its extras under stages/, and the parameters that the next stage starts from."""
        model = stage.finish(state)
        folder = self.workdir / "stages" / stage.context.name
        folder.mkdir(parents=True, exist_ok=True)
        stage.export(state, folder)
        if stage.context.index + 1 < len(self.names):
            kept = traverse_util.unflatten_dict({**self.carried, **self.changed(model)}, sep="/")
            self.checkpoints.save_params(stage.context.index + 1, kept)
        return model

    def changed(self, model: Model) -> dict[str, Any]:
        """Leaves by path that are not those of the model as it was before any training."""
        before, after = (traverse_util.flatten_dict(m.params, sep="/") for m in (self.initial, model))
        return {path: leaf for path, leaf in after.items() if leaf is not before.get(path)}

    def export(self, model: Model) -> Path:
        """Writes the model and the report at the end of a run, unless they are there."""
        export = self.workdir / "export"
        if not max_over_processes(is_main() and export.exists()):
            changed = self.changed(model).keys()
            self.initial = None  # what the run began with is not held beside what it ends with
            part = self.workdir / f"export.part{os.getpid()}"
            streamed(model.params, lambda params: self.save_model(model.replace(params=params), part, changed))
            if is_main():
                part.rename(export)
        if is_main():
            draw_curves(self.workdir)
            report = write_report(self.workdir, f"{', then '.join(self.names)}: {self.workdir.name}")
            self.files.complete()
            self.say(f"Done: the model is in {self.files.name(export)}, the report in {self.files.name(report)}.")
        wait_for_all("export")
        return export


def _shown(metrics: dict[str, float]) -> dict[str, str]:
    """The few numbers that fit on a progress bar."""
    names = [name for name in metrics if name in ("loss", "reward", "kl")] or list(metrics)[:3]
    return {name: f"{metrics[name]:.4g}" for name in names}
