"""Scoring a model on held-out prompts with fixed seeds; stages of training and `launch.evaluate` share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, config_dict
from PIL import Image

from unipic2_jax.core.errors import ConfigError, nearest
from unipic2_jax.data.prompts import PromptRecord, PromptSource, make_source, source_pictures, stack_sources
from unipic2_jax.models import sampling
from unipic2_jax.models.conditioner import tokenize_negative
from unipic2_jax.parallel.mesh import batch_shards, shard_batch
from unipic2_jax.parallel.processes import gather_json, own_share, to_host
from unipic2_jax.pictures import resize as pictures
from unipic2_jax.pictures.sheet import contact_sheet
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


class Evaluator:
    """Generates with given parameters and scores: one compiled program, always the same prompts and noise.

    Sample j of prompt i has the seed `config.seed + i * samples + j`, whatever the batch size or number of devices.
    """

    def __init__(
        self,
        name: str,
        config: ConfigDict,
        bundle: Any,
        mesh: jax.sharding.Mesh,
        precision: Precision = PRECISIONS["float32"],
    ):
        self.name, self.config, self.bundle, self.mesh = name, config, bundle, mesh
        source = make_source(config.source, config.seed)
        # A file is gone through once at most: the same prompt with the same seeds would be no further evidence.
        self.count = min(config.num_prompts, len(source)) if isinstance(source, Sized) else config.num_prompts
        self.records = source.batch(0, self.count)
        self.scorer = Scorer(make_entries(config.rewards, mesh, precision))
        factor = bundle.vae.config.downsampling
        pictures.check_size(config.height, config.width, factor * bundle.transformer.config.patch_size)
        self.shape = (config.height // factor, config.width // factor, bundle.transformer.config.in_channels)
        self.sigmas = bundle.scheduler.sigmas(config.num_steps)
        devices = batch_shards(mesh)
        self.batch = math.ceil(min(config.batch_size, self.count * config.samples) / devices) * devices
        self._sample = jax.jit(self._images)

    def _images(self, params, lora, tokens, negative, seeds, sources):
        keys = sampling.image_keys(seeds)
        return sampling.sample_images(
            self.bundle,
            params,
            tokens,
            sampling.initial_noise(keys, self.shape),
            self.sigmas,
            negative_tokens=negative,
            guidance_scale=self.config.guidance_scale,
            reference_images=sources,
            reference_keys=keys,
            lora=lora,
        )

    def generate(self, params: Any, lora: Any = None) -> np.ndarray:
        """uint8 [prompts * samples, H, W, 3], the samples of a prompt next to each other."""
        config = self.config
        total = self.count * config.samples
        conditioner = self.bundle.conditioner
        edited = source_pictures(self.records, config.height, config.width)
        sources = stack_sources(edited)
        tokens = conditioner.tokenize([record.prompt for record in self.records], edited)
        guided = config.guidance_scale > 1
        negative = tokenize_negative(conditioner, config.negative_prompt, edited) if guided else None
        # One row serves all prompts, unless it is read together with their images.
        own_negative = negative if conditioner.reads_images and edited is not None else None
        made = []
        for start in range(0, total, self.batch):
            # A short last batch is filled up, so that it does not cost another compilation.
            index = np.minimum(np.arange(start, start + self.batch), total - 1)
            prompts = index // config.samples
            rows = {
                "tokens": tokens,
                "negative": own_negative,
                "sources": None if sources is None else sources[:, None],
            }
            batch = shard_batch(jax.tree.map(lambda x, prompts=prompts: x[prompts], rows), self.mesh)
            seeds = shard_batch((config.seed + index).astype(np.uint32), self.mesh)
            unconditional = negative if own_negative is None else batch["negative"]
            images = self._sample(params, lora, batch["tokens"], unconditional, seeds, batch["sources"])
            made.append(pictures.to_uint8(to_host(images)))
        return np.concatenate(made)[:total]

    def run(self, params: Any, lora: Any = None) -> dict[str, Any]:
        """Metrics, scores [prompts, samples] and a contact sheet, as `Stage.evaluate` returns them.

        Names are '{evaluation}/{reward}', '{evaluation}/{reward}_{detail}', and for metrics '.../{tag}' too when the
        prompts have tags.
        """
        config = self.config
        images = self.generate({name: tree for name, tree in params.items() if name != "lora"}, lora)
        repeated = [record for record in self.records for _ in range(config.samples)]
        metrics, scores = {}, {}
        for title, column in self._scores(images, repeated).items():
            table = column.reshape(self.count, config.samples)
            scores[f"{self.name}/{title}"] = table
            metrics |= self._means(f"{self.name}/{title}", table)
        for name, entry in self.scorer.entries.items():
            unscored = np.isnan(scores[f"{self.name}/{name}"]).ravel()
            if failed := sum(bad and entry.is_about(record) for bad, record in zip(unscored, repeated)):
                metrics[f"{self.name}/{name}_failed"] = failed
        return {"metrics": metrics, "scores": scores, "images": {self.name: self._sheet(images)}}

    def _scores(self, images: np.ndarray, records: list[PromptRecord]) -> dict[str, np.ndarray]:
        """'{reward}' and '{reward}_{detail}' -> [prompts * samples]; each process scores its share of the prompts."""
        own = own_share(self.count, self.mesh)
        rows = slice(own.start * self.config.samples, own.stop * self.config.samples)
        scored = self.scorer.score(list(images[rows]), records[rows])
        columns = {}
        for name, values in scored.values.items():
            columns |= {name: values, **{f"{name}_{detail}": row for detail, row in scored.details[name].items()}}
        found = [len(images[rows]), {title: column.tolist() for title, column in columns.items()}]
        shares = gather_json(found, self.mesh)
        titles = dict.fromkeys(title for _, found in shares for title in found)
        # A process all of whose calls failed knows no details.
        return {
            title: np.concatenate([found.get(title, [np.nan] * count) for count, found in shares]) for title in titles
        }

    def _means(self, title: str, table: np.ndarray) -> dict[str, float]:
        """The mean, and that of every tag; a mean over nothing is left out."""
        tags = np.array([str(record.metadata.get("tag", "")) for record in self.records])
        rows = {
            title: np.ones(len(tags), bool),
            **{f"{title}/{tag}": tags == tag for tag in dict.fromkeys(tags) if tag},
        }
        valid = {name: table[row][~np.isnan(table[row])] for name, row in rows.items()}
        return {name: float(values.mean()) for name, values in valid.items() if values.size}

    def _sheet(self, images: np.ndarray) -> Image.Image:
        """The samples of a prompt side by side, its source picture first when there is one; a row holds whole prompts."""
        shown, captions = [], []
        samples = min(4, self.config.samples)
        for number, record in enumerate(self.records[: self.config.pictures]):
            if record.image is not None:
                shown.append(record.image)
                captions.append("source")
            first = number * self.config.samples
            shown += list(images[first : first + samples])
            captions += [record.prompt] * samples
        together = samples + (self.records[0].image is not None)
        return contact_sheet(shown, captions, columns=together * max(1, 6 // together))


def make_evaluators(
    evaluations: Mapping[str, Mapping[str, Any]],
    bundle: Any,
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
