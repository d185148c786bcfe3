"""Teaching a vision-language model to answer questions about pictures; the first stage of the tiny MetaQuery model."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.questions import make_questions
from unipic2_jax.evaluation.vqa import HELD_OUT_SEED, answer_questions, conversation, score_answers
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.optim.ema import ema_update
from unipic2_jax.optim.optimizer import make_optimizer
from unipic2_jax.parallel.mesh import check_rows, shard_batch
from unipic2_jax.parallel.rules import constrain_parameters
from unipic2_jax.pipelines.chat import ChatModel
from unipic2_jax.training.stage import STAGES, Stage, StageContext, stage_fields
from unipic2_jax.training.stages.vlm_loss import answer_loss

ENCODE_BATCH = 256
# How a question is put: as `launch.chat` does, or as `models.metaquery.conditioner` puts prompts.
FORMS = {
    "chat": {"system_prompt": True, "mrope": True},
    "conditioner": {"system_prompt": False, "mrope": False},
}


class VLMState(NamedTuple):
    """What changes."""

    params: Any
    opt_state: Any
    ema: Any


@STAGES.register("vlm")
class VLMStage(Stage):
    """Trains the Qwen2.5-VL of a MetaQuery model on answers; everything else in the bundle stays."""

    bundle: Bundle

    @classmethod
    def default_config(cls) -> ConfigDict:
        config = stage_fields()
        config.kind = "vlm"
        config.data = {}  # see data.questions.make_questions
        config.heldout = {}  # the same, of the questions that are measured
        config.measure = 300  # how many of them
        config.max_new_tokens = 48
        config.pool = 1024  # questions that are prepared once and drawn from
        config.text_length = 64  # tokens of question, answer and template, images not counted
        config.equal_answers = False  # a short answer counts as much as a long one
        config.forms = ("chat",)  # of FORMS, used in turn
        config.batch_size = 64
        config.ema_decay = 0.99
        del config.optimizer["trainable"]
        return config

    @classmethod
    def check(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
        """Builds everything that the configuration describes and that costs nothing."""
        for source in (config.data, config.heldout):
            make_questions(source, 0).question(0)
        if config.pool % ENCODE_BATCH:
            raise ConfigError(f"pool is {config.pool}; make it a multiple of {ENCODE_BATCH}.")
        if not config.forms or set(config.forms) - FORMS.keys():
            raise ConfigError(f"forms is {tuple(config.forms)}; use some of {', '.join(FORMS)}.")
        make_optimizer(config.optimizer, config.steps)
        check_rows(config.batch_size, mesh)

    def __init__(self, config: ConfigDict, bundle: Bundle, context: StageContext):
        super().__init__(config, bundle, context)
        if "vlm" not in bundle.conditioner.modules:
            raise ConfigError("a stage of kind 'vlm' needs a MetaQuery model; this one has text encoders.")
        # Computing a layer again costs less than moving its activations through memory, on a CPU too.
        self.vlm = bundle.conditioner.vlm.clone(remat="full")
        self.processor = bundle.conditioner.processor
        self.questions = make_questions(config.data, context.data_seed())
        heldout = make_questions(config.heldout, HELD_OUT_SEED)
        self.heldout = [heldout.question(index) for index in range(config.measure)]
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._pool: Any = None  # a cache of what `_prepared` gives

    def _prepared(self) -> Any:
        """(VLMInput, answers' tokens) of the whole pool, made when it is first needed."""
        if self._pool is None:
            parts = []
            for start in tqdm(range(0, self.config.pool, ENCODE_BATCH), desc="preparing questions", disable=None):
                asked = [self.questions.question(start + i) for i in range(ENCODE_BATCH)]
                answers = [question.answer for question in asked]
                form = FORMS[self.config.forms[start // ENCODE_BATCH % len(self.config.forms)]]
                options = {"text_length": self.config.text_length, **form}
                parts.append(self.processor.with_answers([conversation(q) for q in asked], answers, **options))
            self._pool = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        return self._pool

    def _train_step(self, state: VLMState, batch: Any, step: jax.Array) -> tuple[VLMState, dict[str, jax.Array]]:
        loss_fn = lambda params: answer_loss(self.vlm, params, *batch, self.config.equal_answers)
        (loss, parts), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        gradients = constrain_parameters(gradients)
        changes, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        ema = ema_update(state.ema, params, step, self.config.ema_decay, 1)
        new = constrain_parameters(VLMState(params, opt_state, ema))
        return new, {"loss": loss, "gradient_norm": optax.global_norm(gradients), **parts}

    def init(self) -> VLMState:
        params = self.bundle.params["conditioner"]["vlm"]
        own, ema = (self.context.precision.lift(params) for _ in range(2))
        return self.place(VLMState(own, self.optimizer.init(own), ema))

    def release(self) -> None:
        for leaf in jax.tree.leaves(self.bundle.params["conditioner"]["vlm"]):
            leaf.delete()

    def step(self, state: VLMState, step: int) -> tuple[VLMState, dict[str, float]]:
        rng = np.random.default_rng([self.context.data_seed(), step])
        index = rng.integers(self.config.pool, size=self.config.batch_size)
        batch = jax.tree.map(lambda leaf: leaf[index], self._prepared())
        state, metrics = self._step(state, shard_batch(batch, self.context.mesh), step)
        return state, jax.device_get(metrics)

    def evaluate(self, state: VLMState, step: int) -> dict[str, Any]:
        """Exact-match accuracy on held-out questions."""
        del step
        model = ChatModel(self.vlm, state.ema, self.processor)
        answers = answer_questions(model, self.heldout, max_new_tokens=self.config.max_new_tokens)
        right, shares = score_answers(self.heldout, answers)
        metrics = {"vqa/exact" + ("" if tag == "overall" else f"/{tag}"): share for tag, share in shares.items()}
        return {"metrics": metrics, "scores": {"vqa/exact": right.astype(float)}}

    def finish(self, state: VLMState) -> Bundle:
        """The averaged weights."""
        conditioner = {**self.bundle.params["conditioner"], "vlm": state.ema}
        return self.bundle.replace(params={**self.bundle.params, "conditioner": conditioner})
