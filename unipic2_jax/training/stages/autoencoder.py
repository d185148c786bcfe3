"""Training an autoencoder from nothing; the tiny model's first stage."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.examples import make_examples
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.sampling import encode_moments, from_uint8
from unipic2_jax.optim.optimizer import make_optimizer
from unipic2_jax.parallel.mesh import check_rows, shard_batch
from unipic2_jax.pictures.resize import to_uint8
from unipic2_jax.pictures.sheet import contact_sheet
from unipic2_jax.training.stage import STAGES, Stage, StageContext, stage_fields
from unipic2_jax.training.stages.autoencoder_loss import autoencoder_loss

# Examples beyond any that a training step reaches: what is measured is not what was trained on.
MEASURED_FROM = 10**9


class AutoencoderState(NamedTuple):
    """What changes."""

    params: Any
    opt_state: Any


@STAGES.register("autoencoder")
class AutoencoderStage(Stage):
    """Trains `bundle.vae`; at the end sets its scaling and shift so that latents have mean 0 and variance 1."""

    bundle: Bundle

    @classmethod
    def default_config(cls) -> ConfigDict:
        config = stage_fields()
        config.kind = "autoencoder"
        config.data = {}  # see data.examples.make_examples
        config.batch_size = 8
        config.kl_weight = 5e-7
        config.measure = 256  # pictures that are reconstructed to measure quality and the latents' statistics
        del config.optimizer["trainable"]
        return config

    @classmethod
    def check(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
        """Builds everything that the configuration describes and that costs nothing."""
        buckets = make_examples(config.data, 0, "image").buckets
        if len(buckets) > 1:
            raise ConfigError(
                f"The autoencoder takes pictures of one shape, and these have {len(buckets)}; prepare one alone."
            )
        make_optimizer(config.optimizer, config.steps)
        check_rows(config.batch_size, mesh)

    def __init__(self, config: ConfigDict, bundle: Bundle, context: StageContext):
        super().__init__(config, bundle, context)
        self.vae = bundle.vae
        source = make_examples(config.data, context.data_seed(), "image")
        self.examples = source.dataset(next(iter(source.buckets)))
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._reconstruct = jax.jit(self._encode_decode)

    def _images(self, first: int, count: int) -> np.ndarray:
        return np.stack([self.examples[index].image for index in range(first, first + count)])

    def _train_step(
        self, state: AutoencoderState, images: jax.Array, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        images = from_uint8(images)

        def loss_fn(params):
            return autoencoder_loss(self.vae, params, images, key, self.config.kl_weight)

        (loss, parts), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        changes, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradients), **parts}
        return AutoencoderState(optax.apply_updates(state.params, changes), opt_state), metrics

    def _encode_decode(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, _ = encode_moments(self.vae, params, from_uint8(images))
        return mean, to_uint8(self.vae.apply({"params": params}, mean, method="decode"))

    def init(self) -> AutoencoderState:
        params = self.context.precision.lift(self.bundle.params["vae"])
        return self.place(AutoencoderState(params, self.optimizer.init(params)))

    def release(self) -> None:
        for leaf in jax.tree.leaves(self.bundle.params["vae"]):
            leaf.delete()

    def step(self, state: AutoencoderState, step: int) -> tuple[AutoencoderState, dict[str, float]]:
        images = self._images(step * self.config.batch_size, self.config.batch_size)
        state, metrics = self._step(state, shard_batch(images, self.context.mesh), self.context.key(step))
        return state, jax.device_get(metrics)

    def _measure(self, state: AutoencoderState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Originals, reconstructions (uint8) and latent means of the measured pictures."""
        images = self._images(MEASURED_FROM, self.config.measure)
        parts = [self._reconstruct(state.params, part) for part in np.array_split(images, max(1, len(images) // 64))]
        latents = np.concatenate([np.asarray(part[0]) for part in parts])
        return images, np.concatenate([np.asarray(part[1]) for part in parts]), latents

    def evaluate(self, state: AutoencoderState, step: int) -> dict[str, Any]:
        """PSNR of pictures that are not trained on, and originals over reconstructions."""
        images, decoded, latents = self._measure(state)
        error = np.mean((images.astype(np.float32) - decoded) ** 2, axis=(1, 2, 3))
        psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-9))
        rows = [picture for pair in zip(images[:12], decoded[:12]) for picture in pair]
        sheet = contact_sheet(rows, ["original", "decoded"] * (len(rows) // 2), columns=6)
        metrics = {"psnr": float(psnr.mean()), "psnr_min": float(psnr.min()), "latent_std": float(latents.std())}
        return {"metrics": metrics, "scores": {"psnr": psnr}, "images": {"reconstructions": sheet}}

    def finish(self, state: AutoencoderState) -> Bundle:
        """The bundle with the trained VAE, whose normalised latents have mean 0 and variance 1 over the measured pictures."""
        latents = self._measure(state)[2]
        config = dataclasses.replace(
            self.vae.config, shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std())
        )
        params = {**self.bundle.params, "vae": state.params}
        return self.bundle.replace(vae=self.vae.clone(config=config), params=params)
