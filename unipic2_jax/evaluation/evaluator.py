"""Scoring a model on held-out prompts with fixed seeds, in the middle of a run; benchmarks of pictures read the same fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, config_dict

from unipic2_jax.core.errors import ConfigError, nearest
from unipic2_jax.data.prompts import PromptRecord, PromptSource, make_source
from unipic2_jax.evaluation import marks
from unipic2_jax.evaluation.maker import PictureMaker
from unipic2_jax.flow.guidance import check_interval
from unipic2_jax.flow.ode import SOLVERS
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.rewards.scoring import Scorer, check_tasks, make_entries
from unipic2_jax.weights.precision import PRECISIONS, Precision


def evaluation_fields() -> ConfigDict:
    """The fields of one evaluation."""
    return ConfigDict(
        {
            "source": {},  # of held-out prompts: kind and options; see data.prompts.make_source
            "rewards": {},  # name -> fields; see rewards.scoring.make_entries
            "num_prompts": 64,  # at most, where the source is a file; 0: nothing is evaluated
            "samples": 4,  # pictures per prompt
            "height": 512,
            "width": 512,
            "num_steps": 40,
            "guidance_scale": 3.5,  # 1 and less: no guidance
            "guidance_interval": config_dict.placeholder(
                tuple
            ),  # noise levels (low, high) of guidance; None: everywhere
            "solver": "euler",  # one of flow.ode.SOLVERS
            "negative_prompt": config_dict.placeholder(str),  # None: the model's own for the task
            "seed": 0,  # of the prompts and of the noise: the same before and after
            "batch_size": 64,
            "pictures": 12,  # prompts shown on the contact sheet
        }
    )


def read_evaluation(name: str, values: Mapping[str, Any]) -> ConfigDict:
    """An evaluation's configuration with its defaults filled in.

    Raises:
      ConfigError: for an unknown field.
    """
    config = evaluation_fields()
    for field, value in values.items():
        if field not in config:
            raise ConfigError(f"evaluations.{name} has no field '{field}'" + nearest(field, config.keys()))
        config[field] = ConfigDict(value) if isinstance(config[field], ConfigDict) else value
    return config


def check_evaluation(name: str, values: Mapping[str, Any]) -> None:
    """Makes the source and the rewards of an evaluation, which say what is wrong with them, and with the source for the rewards.

    Raises:
      ConfigError: one sentence with the name of the evaluation.
    """
    config = read_evaluation(name, values)
    if config.num_prompts < 0 or config.samples < 1:
        raise ConfigError(
            f"evaluations.{name} has {config.num_prompts} prompts and {config.samples} samples of each; use 0 or more prompts, "
            "and a sample at least."
        )
    if config.negative_prompt is not None and config.guidance_scale <= 1:
        raise ConfigError(
            f"evaluations.{name}.negative_prompt changes nothing at guidance_scale {config.guidance_scale:g}, which is no guidance; "
            "raise it, or leave negative_prompt out."
        )
    try:
        check_interval(config.guidance_interval, config.guidance_scale)
    except ValueError as error:
        raise ConfigError(f"evaluations.{name}: {error}") from error
    if config.solver not in SOLVERS:
        raise ConfigError(f"evaluations.{name}.solver is {config.solver!r}; choose one of {', '.join(SOLVERS)}.")
    if not is_wanted(config):
        return
    if not config.source:
        raise ConfigError(f"evaluations.{name} has no source; give it one, as source={{'kind': 'geneval'}}.")
    try:
        source = make_source(config.source, config.seed)
        check_tasks(make_entries(config.rewards), source)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"evaluations.{name}: {error}") from error


def evaluation_sources(evaluations: Mapping[str, Mapping[str, Any]]) -> list[PromptSource]:
    """The held-out prompts of those evaluations that have some."""
    configs = [read_evaluation(name, values) for name, values in evaluations.items()]
    return [make_source(config.source, config.seed) for config in configs if is_wanted(config)]


def is_wanted(config: ConfigDict) -> bool:
    """Whether an evaluation has prompts; a recipe leaves the path to them empty where only its user has some."""
    return config.num_prompts > 0 and config.source.get("path") != ""


def held_out(config: ConfigDict) -> list[PromptRecord]:
    """The prompts of an evaluation. A file is gone through once at most: the same prompt with the same seeds would be no further
    evidence.
    """
    source = make_source(config.source, config.seed)
    count = min(config.num_prompts, len(source)) if isinstance(source, Sized) else config.num_prompts
    return source.batch(0, count)


class Evaluator:
    """Generates with given parameters and scores: always the same prompts and noise; `PictureMaker` has the seeds."""

    def __init__(
        self,
        name: str,
        config: ConfigDict,
        bundle: Bundle,
        mesh: jax.sharding.Mesh,
        precision: Precision = PRECISIONS["float32"],
    ):
        self.name, self.config, self.mesh = name, config, mesh
        self.records = held_out(config)
        self.scorer = Scorer(make_entries(config.rewards, mesh, precision))
        self.maker = PictureMaker(config, self.records, bundle, mesh)

    def generate(self, params: Any, lora: Any = None) -> np.ndarray:
        """uint8 [prompts * samples, H, W, 3], the samples of a prompt next to each other."""
        return np.concatenate([made for _, made in self.maker.make(params, lora)])

    def run(self, params: Any, lora: Any = None) -> dict[str, Any]:
        """Metrics, scores [prompts, samples] and a contact sheet, as `Stage.evaluate` returns them.

        Names are '{evaluation}/{reward}', '{evaluation}/{reward}_{detail}', and for metrics '.../{tag}' too when the
        prompts have tags.
        """
        images = self.generate({name: tree for name, tree in params.items() if name != "lora"}, lora)
        shape = (len(self.records), self.config.samples)
        columns, _ = marks.columns(self.scorer, images, self.records, self.mesh)
        tables = {title: column.reshape(shape) for title, column in columns.items()}
        metrics = {
            **marks.means(tables, self.records),
            **marks.failures(tables, self.records, self.scorer.entries),
        }
        shown = slice(self.config.pictures)
        sheet = marks.sheet(images.reshape(*shape, *images.shape[1:])[shown], self.records[shown])
        named = lambda values: {f"{self.name}/{title}": value for title, value in values.items()}
        return {"metrics": named(metrics), "scores": named(tables), "images": {self.name: sheet}}


def make_evaluators(
    evaluations: Mapping[str, Mapping[str, Any]],
    bundle: Bundle,
    mesh: jax.sharding.Mesh,
    precision: Precision,
    stage: str,
    log: Callable[[str], None],
) -> list[Evaluator]:
    """Those of a stage, of which `log` is told. One whose source has an empty path is left out, and the log says how to name a file."""
    made = []
    for name, values in evaluations.items():
        if is_wanted(config := read_evaluation(name, values)):
            made.append(Evaluator(name, config, bundle, mesh, precision))
        elif config.num_prompts:
            flag = f"--config.stages.{stage}.evaluations.{name}.source.path=FILE"
            log(f"{stage}: '{name}' is not evaluated, for want of held-out prompts; name some with {flag}.")
    return made
