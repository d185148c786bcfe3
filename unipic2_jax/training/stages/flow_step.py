"""The device's side of a flow stage: losses and updates as pure functions of arrays (paper section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import linen as nn

from unipic2_jax.flow.loss import draw_corruption, flow_losses, loss_by_noise
from unipic2_jax.flow.timesteps import TimestepSampling
from unipic2_jax.models.conditioner import Conditioner, conditioning_with_dropout
from unipic2_jax.models.lora import scaled
from unipic2_jax.models.sampling import encode_moments, from_uint8, reference_latents, velocity_fn
from unipic2_jax.models.sd3.vae import AutoencoderKL
from unipic2_jax.optim.ema import ema_update
from unipic2_jax.optim.optimizer import merge_params
from unipic2_jax.parallel.rules import constrain_parameters


class FlowState(NamedTuple):
    """What changes."""

    trained: Any
    opt_state: Any
    ema: Any


@dataclasses.dataclass(frozen=True, eq=False)
class FlowStep:
    """What a flow stage computes with arrays, and what it is told once. Batches are those of `data.collate.Collate`.

    Attributes:
      vae, transformer, conditioner: the networks; the last two keep for the backward pass what the stage's `remat` says.
      num_train_timesteps: of the model's schedule.
      optimizer: of what is trained.
      sampling: of noise levels.
      weighting: of losses, see `flow.timesteps.velocity_loss`.
      caption_dropout: by task.
      sample_latents: a picture becomes a sample of the VAE's posterior, and not its mode.
      lora_scale: what the LoRA's update is multiplied by; None: there is no LoRA.
      accumulation: parts that a batch is computed in, one after the other.
      ema_decay: of the moving average of what is trained.
    """

    vae: AutoencoderKL
    transformer: nn.Module
    conditioner: Conditioner
    num_train_timesteps: int
    optimizer: optax.GradientTransformation
    sampling: TimestepSampling
    weighting: str
    caption_dropout: Mapping[str, float]
    sample_latents: bool
    lora_scale: float | None
    accumulation: int
    ema_decay: float

    def applied(self, params: Any) -> Any:
        """Parameters whose LoRA, if they have one, is scaled as a network is given it."""
        return params if self.lora_scale is None else {**params, "lora": scaled(params["lora"], self.lora_scale)}

    def latent_shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        """[B, h, w, C] of a batch's latents."""
        if "mean" in batch:
            return batch["mean"].shape
        count, height, width, _ = batch["images"].shape
        factor = self.vae.config.downsampling
        return count, height // factor, width // factor, self.vae.config.latent_channels

    def moments(self, vae: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The VAE's moments [B, h, w, C] of 'images' and [B, R, h, w, C] of 'reference_images', where a batch has these; without
        'logvar' where only modes are used.

        Args:
          vae: its parameters.
        """
        made = {}
        for name, prefix in (("images", ""), ("reference_images", "reference_")):
            if name not in batch:
                continue
            *leading, height, width, channels = batch[name].shape
            flat = batch[name].reshape(-1, height, width, channels)
            mean, logvar = encode_moments(self.vae, vae, from_uint8(flat))
            made[f"{prefix}mean"] = mean.reshape(*leading, *mean.shape[1:])
            if self.sample_latents:
                made[f"{prefix}logvar"] = logvar.reshape(*leading, *logvar.shape[1:])
        return made

    def latents(self, vae: Any, batch: Mapping[str, Any], keys: jax.Array) -> dict[str, Any]:
        """The batch with normalised 'latents' [B, h, w, C] and 'references' [B, R, h, w, C] instead of pictures.

        Args:
          vae: its parameters.
          keys: one per example [B]; its pictures get noise of their own from it.
        """
        batch = {**batch, **self.moments(vae, batch)}
        drawn = self.sample_latents
        batch["latents"] = reference_latents(
            self.vae, batch["mean"], batch["logvar"] if drawn else None, keys if drawn else None
        )
        if (mean := batch.get("reference_mean")) is not None:
            size, count = mean.shape[:2]
            flat = lambda x: x.reshape(-1, *x.shape[2:])
            references = reference_latents(
                self.vae,
                flat(mean),
                flat(batch["reference_logvar"]) if drawn else None,
                jnp.repeat(keys, count) if drawn else None,
                1 + jnp.tile(jnp.arange(count), size),
            )
            batch["references"] = references.reshape(mean.shape)
        return batch

    def losses(self, params: Any, batch: Any, dropped: Any, corruption: Any, keys: jax.Array) -> jax.Array:
        """Losses [B] of a batch, or of a part of one.

        Args:
          params: of all networks, and 'lora' where one is trained.
          dropped: what stands for a dropped caption, one row for all: 'empty_tokens', 'empty_conditioning', or neither where
            each example has its own or none is dropped.
          corruption: of `flow.loss.draw_corruption`.
          keys: see `latents`.
        """
        batch = self.latents(params["vae"], batch, keys)
        params = self.applied(params)
        # Without dropped captions any row will do, since none is taken.
        instead = {"empty_tokens": batch.get("tokens"), "empty_conditioning": batch.get("conditioning")}
        batch = {**instead, **dropped, **batch}
        conditioner = params.get("conditioner")  # stored conditioning needs none
        velocity = velocity_fn(
            self.transformer,
            params["transformer"],
            conditioning_with_dropout(self.conditioner, conditioner, batch, corruption["drop"]),
            batch.get("references"),
            lora=params.get("lora"),
            num_train_timesteps=self.num_train_timesteps,
        )
        return flow_losses(velocity, batch["latents"], corruption, self.weighting)

    def train_step(
        self, state: FlowState, frozen: Any, batch: Any, dropped: Any, key: jax.Array, step: jax.Array, task: str
    ) -> tuple[FlowState, dict[str, jax.Array]]:
        """The state after step number `step`, and its metrics."""
        # Everything random is drawn for the whole batch, so that it does not depend on the parts.
        shape = self.latent_shape(batch)
        corruption = draw_corruption(key, shape, self.sampling, self.caption_dropout[task])
        keys = jax.random.split(jax.random.fold_in(key, 1), shape[0])

        def loss_fn(trained, batch, corruption, keys):
            losses = self.losses(merge_params(trained, frozen), batch, dropped, corruption, keys)
            return losses.mean(), losses

        whole = {"batch": batch, "corruption": corruption, "keys": keys}
        gradients, losses = self._gradients(jax.grad(loss_fn, has_aux=True), state.trained, whole)
        gradients = constrain_parameters(gradients)
        changes, opt_state = self.optimizer.update(gradients, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, changes)
        ema = ema_update(state.ema, trained, step, self.ema_decay, 1)
        metrics = {**loss_by_noise(losses, corruption["sigma"]), "gradient_norm": optax.global_norm(gradients)}
        return constrain_parameters(FlowState(trained, opt_state, ema)), metrics

    def _gradients(self, gradient_fn: Any, trained: Any, whole: dict[str, Any]) -> tuple[Any, jax.Array]:
        """Mean gradients and losses [B] of a batch, computed in its parts."""
        parts = self.accumulation
        if parts == 1:
            return gradient_fn(trained, **whole)
        # Every device keeps its examples and has some of each part.
        split = lambda x: rearrange(x, "(b parts) ... -> parts b ...", parts=parts)

        def accumulate(total, part):
            gradients, losses = gradient_fn(trained, **part)
            total = jax.tree.map(lambda t, g: t + g / parts, total, gradients)
            return constrain_parameters(total), losses

        zeros = constrain_parameters(jax.tree.map(jnp.zeros_like, trained))
        gradients, losses = jax.lax.scan(accumulate, zeros, jax.tree.map(split, whole))
        return gradients, rearrange(losses, "parts b -> (b parts)")

    def validation_losses(self, params: Any, batch: Any, key: jax.Array, sigmas: tuple[float, ...]) -> jax.Array:
        """Mean losses [S] of a batch at each of the noise levels `sigmas`, all with the same noise."""
        shape = self.latent_shape(batch)
        corruption = draw_corruption(key, shape, self.sampling)
        keys = jax.random.split(key, shape[0])
        level = lambda sigma: self.losses(
            params, batch, {}, {**corruption, "sigma": jnp.full(shape[:1], sigma)}, keys
        ).mean()
        return jax.lax.map(level, jnp.asarray(sigmas, jnp.float32))
