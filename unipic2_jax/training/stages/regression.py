"""Teaching a vision-language model to score edits as a judge did: EditReward (paper, section 3.2)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from unipic2_jax.core.errors import ConfigError, TrainingError
from unipic2_jax.data.labelled_edits import LabelledEdits
from unipic2_jax.data.prepared import PreparedExample
from unipic2_jax.evaluation.agreement import Agreement, agreement, reliability_picture
from unipic2_jax.models.edit_reward.model import (
    EditRewardModel,
    apply,
    check_combine,
    combine,
    pad_to,
    to_bucket,
    with_lora,
)
from unipic2_jax.models.qwen.processor import VLMInput
from unipic2_jax.models.remat import check_policy
from unipic2_jax.optim.optimizer import make_optimizer
from unipic2_jax.parallel.mesh import batch_shards, check_rows, shard_batch
from unipic2_jax.parallel.processes import is_main, local_rows, to_host
from unipic2_jax.parallel.rules import constrain_parameters
from unipic2_jax.pictures.decode import decode
from unipic2_jax.training.stage import NO_STEP, STAGES, Stage, StageContext, stage_fields

NAME = "edit_reward"  # of its metrics
PREPARE_BATCH = 256


class RegressionState(NamedTuple):
    """What changes: the head, and the LoRA or the whole vision-language model."""

    trained: Any
    opt_state: Any


class Batch(NamedTuple):
    """Questions, the judge's marks float32 [B, targets], its overall score [B], and which share prompt and source."""

    given: VLMInput
    marks: np.ndarray
    overall: np.ndarray
    groups: list[str]


@STAGES.register("regression")
class RegressionStage(Stage):
    """Mean squared error on the judge's marks; the model is an `EditRewardModel`, its targets are those of its spec."""

    bundle: EditRewardModel

    @classmethod
    def default_config(cls) -> ConfigDict:
        config = stage_fields()
        config.kind = "regression"
        config.data = ""  # folders of scored edits to train on, with commas between them, see launch.score_edits
        config.heldout = ""  # of those that are measured; no source picture of theirs is among the others
        config.measure = 0  # how many of them; 0: all
        config.overall = "score"  # the mark that the combined prediction is compared with
        config.combine = "geometric"  # geometric | mean | a target
        config.gate = 0.0  # the run fails when Spearman's correlation ends below it; 0: it never does
        config.in_memory = False  # prepare all questions once and keep them; with LoRA the vision tower sees them once
        config.batch_size = 64
        config.remat = "full"
        config.lora = ConfigDict({"rank": 32, "alpha": 64.0})  # rank 0: the whole vision-language model is trained
        del config.optimizer["trainable"]
        return config

    @classmethod
    def check(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
        """Opens the data and builds everything that costs nothing."""
        for field in ("data", "heldout"):
            if not config[field]:
                raise ConfigError(f"{field} names no folder of scored edits; make one with launch.score_edits.")
            LabelledEdits(config[field], (config.overall,))
        check_policy(config.remat)
        if config.lora.rank < 0:
            raise ConfigError(
                f"lora.rank is {config.lora.rank}; use 1 or more, or 0 to train the whole vision-language model."
            )
        make_optimizer(config.optimizer, config.steps)
        check_rows(config.batch_size, mesh)

    def __init__(self, config: ConfigDict, bundle: EditRewardModel, context: StageContext):
        super().__init__(config, bundle, context)
        if not isinstance(bundle, EditRewardModel):
            raise ConfigError(f"a stage of kind 'regression' trains an EditReward; set config.model to '{NAME}'.")
        targets = bundle.spec.targets
        check_combine(config.combine, targets)
        self.data, self.heldout = (LabelledEdits(config[f], (config.overall, *targets)) for f in ("data", "heldout"))
        self.model = bundle
        if config.lora.rank:
            self.model = with_lora(bundle, context.key(NO_STEP), config.lora.rank, config.lora.alpha)
        elif "lora" in bundle.params:
            raise ConfigError("the EditReward that is continued has a LoRA; give lora.rank its rank instead of 0.")
        self.module = self.model.module.clone(remat=config.remat)
        self.trained_groups = ("lora", "head") if config.lora.rank else ("vlm", "head")
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self._step = jax.jit(self._train_step, donate_argnums=0)
        look = lambda vlm, vision: self.module.apply({"params": {"vlm": vlm}}, vision, method="look")
        self._look = jax.jit(look)
        self._predict = jax.jit(lambda params, given: apply(self.module, params, given))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="questions")
        # Caches; whatever is not in them is made again, the same.
        self._pools: dict[str, Batch] = {}  # of `_pool` and `_judged`
        self._ahead: dict[int, Future[Batch]] = {}  # the next step's rows
        self._measured: tuple[int, Agreement] | None = None  # the last evaluation, and after which step

    @property
    def frozen(self) -> dict[str, Any]:
        """Parameters that stay as they are."""
        return {name: tree for name, tree in self.model.params.items() if name not in self.trained_groups}

    def _batch(self, what: str, index: Sequence[int]) -> Batch:
        """Examples by number, of the 'data' or the 'heldout' ones."""
        data: LabelledEdits = getattr(self, what)
        targets = self.model.spec.targets
        examples = [data[int(i)] for i in index]
        pictures = [(decode(e.references[0], e.name), decode(e.image, e.name)) for e in examples]
        given = self.model.prepare(*zip(*pictures), [example.prompt for example in examples])
        marks = np.asarray([[_mark(e, name) for name in targets] for e in examples], np.float32)
        overall = np.asarray([_mark(e, self.config.overall) for e in examples], np.float64)
        if not (np.isfinite(marks).all() and marks.min() >= 0 and marks.max() <= 1):
            raise TrainingError(
                f"A mark of the edits in {self.config[what]} is outside 0 to 1; scale the judge's marks."
            )
        return Batch(given, marks, overall, [_group(example) for example in examples])

    def _pool(self, what: str, count: int) -> Batch:
        """The first examples of the data or of the held-out ones, prepared once."""
        if what not in self._pools:
            parts = [
                self._batch(what, range(start, min(count, start + PREPARE_BATCH)))
                for start in tqdm(range(0, count, PREPARE_BATCH), desc=f"preparing {what}", disable=None)
            ]
            shape = [max(part.given.input_ids.shape[1] for part in parts)]
            shape += [max(part.given.vision.frames.shape[1] for part in parts)]
            given = [self._smaller(pad_to(part.given, *shape)) for part in parts]
            self._pools[what] = Batch(
                jax.tree.map(lambda *leaves: np.concatenate(leaves), *given),
                *(np.concatenate([getattr(part, name) for part in parts]) for name in ("marks", "overall")),
                [group for part in parts for group in part.groups],
            )
        return self._pools[what]

    def _smaller(self, given: VLMInput) -> VLMInput:
        """Questions as they are kept: pictures as a tower sees them that stays as it is, else as they are."""
        vision, rows = given.vision, len(given.valid)
        if "vlm" in self.trained_groups:
            return given
        devices = batch_shards(self.context.mesh)
        index = np.minimum(np.arange(-(-rows // devices) * devices), rows - 1)
        seen = self._look(self.frozen["vlm"], shard_batch(jax.tree.map(lambda x: x[index], vision), self.context.mesh))
        return given._replace(vision=jax.tree.map(lambda x: to_host(x)[:rows], seen))

    def _training_rows(self, step: int) -> Batch:
        """This process's rows of a step's batch."""
        rng = np.random.default_rng([self.context.data_seed(), step])
        index = rng.integers(len(self.data), size=self.config.batch_size)
        index = index[local_rows(self.context.mesh, self.config.batch_size)]
        if not self.config.in_memory:
            return self._batch("data", index)
        pool = self._pool("data", len(self.data))
        given = jax.tree.map(lambda leaf: leaf[index], pool.given)
        return Batch(given, pool.marks[index], pool.overall[index], [])

    def _placed(self, given: VLMInput, *arrays: np.ndarray) -> Any:
        """Rows of this process on the mesh; those that are not kept are padded to few lengths."""
        given = given if self.config.in_memory else to_bucket(given)
        return shard_batch((given, *arrays), self.context.mesh, local=True)

    def _train_step(
        self, state: RegressionState, frozen: Any, given: VLMInput, marks: jax.Array
    ) -> tuple[RegressionState, dict[str, jax.Array]]:
        def loss_fn(trained: Any) -> tuple[jax.Array, jax.Array]:
            error = apply(self.module, {**frozen, **trained}, given) - marks
            return jnp.mean(error**2), jnp.mean(jnp.abs(error))

        (loss, error), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        gradients = constrain_parameters(gradients)
        changes, opt_state = self.optimizer.update(gradients, state.opt_state, state.trained)
        new = constrain_parameters(RegressionState(optax.apply_updates(state.trained, changes), opt_state))
        return new, {"loss": loss, "absolute_error": error, "gradient_norm": optax.global_norm(gradients)}

    def init(self) -> RegressionState:
        trained = self.context.precision.lift({name: self.model.params[name] for name in self.trained_groups})
        return self.place(RegressionState(trained, self.optimizer.init(trained)))

    def release(self) -> None:
        if not self.config.lora.rank:
            for leaf in jax.tree.leaves(self.model.params["vlm"]):
                leaf.delete()

    def step(self, state: RegressionState, step: int) -> tuple[RegressionState, dict[str, float]]:
        begun = self._ahead.pop(step, None)
        rows = begun.result() if begun else self._training_rows(step)
        if not self.config.in_memory and step + 1 < self.config.steps:
            self._ahead[step + 1] = self._thread.submit(self._training_rows, step + 1)
        state, metrics = self._step(state, self.frozen, *self._placed(rows.given, rows.marks))
        return state, jax.device_get(metrics)

    def predict(self, trained: Any) -> tuple[np.ndarray, Batch]:
        """Scores [N, targets] of the held-out edits, and what the judge gave them."""
        size, mesh = self.config.batch_size, self.context.mesh
        count = min(self.config.measure or len(self.heldout), len(self.heldout))
        rows, params, made, parts = local_rows(mesh, size), {**self.frozen, **trained}, [], []
        for start in range(0, count, size):
            # A short last batch is filled up, so that it does not cost another compilation.
            index = np.minimum(np.arange(start, start + size), count - 1)
            if self.config.in_memory:
                pool = self._pool("heldout", count)
                given = jax.tree.map(lambda leaf, own=index[rows]: leaf[own], pool.given)
            else:
                given = self._batch("heldout", index[rows]).given
            made.append(to_host(self._predict(params, self._placed(given)[0])))
            parts.append(index)
        return np.concatenate(made)[:count], self._judged(count)

    def _judged(self, count: int) -> Batch:
        """What the judge gave the held-out edits; the same on every process."""
        if self.config.in_memory:
            return self._pool("heldout", count)
        if "judged" not in self._pools:
            targets, examples = self.model.spec.targets, (self.heldout[i] for i in range(count))
            read = [
                (
                    [_mark(e, name) for name in targets],
                    _mark(e, self.config.overall),
                    _group(e),
                )
                for e in examples
            ]
            marks, overall, groups = zip(*read)
            self._pools["judged"] = Batch(None, np.asarray(marks, np.float32), np.asarray(overall), list(groups))
        return self._pools["judged"]

    def evaluate(self, state: RegressionState, step: int) -> dict[str, Any]:
        """Agreement with the judge on held-out edits: '{what}' for the combined score, '{what}/{target}' for each."""
        targets = self.model.spec.targets
        scores, judged = self.predict(state.trained)
        total = combine(scores, self.config.combine, targets)
        whole = agreement(total, judged.overall, judged.groups)
        self._measured = step, whole
        metrics = {f"{NAME}/{name}": value for name, value in whole.numbers().items()}
        for column, target in enumerate(targets):
            single = agreement(scores[:, column], judged.marks[:, column], judged.groups).numbers()
            metrics |= {f"{NAME}/{name}/{target}": value for name, value in single.items()}
        for number, (predicted, score, count) in enumerate(whole.bins):
            row = {"predicted": predicted, "judged": score, "count": count}
            metrics |= {f"{NAME}/bin/{number}_{name}": value for name, value in row.items()}
        title = f"held-out edits: calibration error {whole.calibration_error:.3f}"
        errors = np.abs(total - judged.overall)
        picture = {f"{NAME}_reliability": reliability_picture(whole.bins, title)}
        return {"metrics": metrics, "scores": {f"{NAME}/error": errors}, "images": picture}

    def _agreement(self, state: RegressionState) -> Agreement:
        """How far the stage's end agrees with the judge. A run that was killed after its last evaluation does not evaluate again: then it is
        measured here."""
        if self._measured is None or self._measured[0] != self.config.steps:
            self.evaluate(state, self.config.steps)
        return self._measured[1]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def finish(self, state: RegressionState) -> EditRewardModel:
        """The EditReward, unless it misses the gate."""
        if self.config.gate:
            spearman = self._agreement(state).spearman
            if not spearman >= self.config.gate:
                raise TrainingError(
                    f"Stage '{self.context.name}' ends with a Spearman correlation of {spearman:.3f} on held-out edits, "
                    f"below the gate of {self.config.gate}; train longer or on more edits in a new workdir."
                )
        spec = self.model.spec if self.config.lora.rank else dataclasses.replace(self.model.spec, base=None)
        return self.model.replace(params={**self.model.params, **state.trained}, spec=spec)

    def export(self, state: RegressionState, folder: Path) -> None:
        """calibration.json: how well it agrees with the judge at the end, and the reliability table."""
        measured = self._agreement(state)  # by all processes
        if is_main():
            text = json.dumps({**measured.numbers(), "bins": measured.bins}, indent=2)
            (folder / "calibration.json").write_text(text + "\n", encoding="utf-8")


def _mark(example: PreparedExample, name: str) -> float:
    return float(example.arrays[name].item())


def _group(example: PreparedExample) -> str:
    """Equal for edits of one picture by one instruction."""
    return hashlib.sha1(example.references[0] + example.prompt.encode()).hexdigest()
