"""The evaluations of a stage: from their configuration to what the loop records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unipic2_jax.data.prompts import make_source
from unipic2_jax.evaluation.tasks import Evaluation, TaskEvaluator
from unipic2_jax.rewards.base import make_reward
from unipic2_jax.training.config import ConfigError, nearest


def evaluation_fields() -> ConfigDict:
    """The fields of one evaluation."""
    return ConfigDict(
        {
            "source": {},  # of held-out prompts: kind and options; see data.prompts.make_source
            "reward": {},  # name and options; see rewards.base.make_reward
            "num_prompts": 64,
            "samples": 4,  # pictures per prompt
            "height": 512,
            "width": 512,
            "num_steps": 40,
            "guidance_scale": 3.5,
            "seed": 0,  # of the prompts and of the noise: the same before and after
            "batch_size": 64,
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


def named_reward(options: Mapping[str, Any]) -> Any:
    """The reward of {'name': ..., **options}."""
    options = dict(options)
    if "name" not in options:
        raise ConfigError("a reward has no name; add one, such as name='shapes_t2i'.")
    return make_reward(options.pop("name"), options)


def check_evaluation(name: str, values: Mapping[str, Any]) -> None:
    """Makes the source and the reward of an evaluation, which raise what is wrong with them."""
    config = read_evaluation(name, values)
    make_source(config.source, config.seed)
    named_reward(config.reward)


class Evaluations:
    """All evaluations of a stage, named by the keys of `configs`."""

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], bundle: Any, mesh: jax.sharding.Mesh):
        self.evaluators: dict[str, TaskEvaluator] = {}
        devices = mesh.shape["data"]
        for name, values in configs.items():
            config = read_evaluation(name, values)
            total = config.num_prompts * config.samples
            self.evaluators[name] = TaskEvaluator(
                bundle,
                make_source(config.source, config.seed).batch(0, config.num_prompts),
                named_reward(config.reward),
                mesh,
                samples=config.samples,
                num_steps=config.num_steps,
                guidance_scale=config.guidance_scale,
                height=config.height,
                width=config.width,
                seed=config.seed,
                batch_size=math.ceil(min(config.batch_size, total) / devices) * devices,
            )

    def run(self, params: Any, lora: Any = None) -> dict[str, Any]:
        """What `Stage.evaluate` returns, for the policy `(params, lora)`."""
        params = {name: tree for name, tree in params.items() if name != "lora"}
        result: dict[str, Any] = {"metrics": {}, "scores": {}, "images": {}}
        for name, evaluator in self.evaluators.items():
            found = evaluator(params, lora)
            tables = {"score": found.values, **found.details}
            result["scores"] |= {f"{name}/{key}": table for key, table in tables.items() if table.ndim == 2}
            result["metrics"] |= {f"{name}/{key}": value for key, value in _metrics(found).items() if value == value}
            result["images"][name] = found.sheet(evaluator.records)
        return result


def _metrics(found: Evaluation) -> dict[str, float]:
    """The overall verdict, the mean score, the verdict for each tag, and how many scores failed; NaN where there is none."""
    failed = np.isnan(found.values)
    values = {"overall": found.overall, "score": float("nan") if failed.all() else float(found.values[~failed].mean())}
    return values | {f"overall/{tag}": value for tag, value in found.by_tag().items()} | {"failed": float(failed.sum())}
