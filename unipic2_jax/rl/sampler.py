"""Prompts -> what an algorithm keeps of their samples, and the pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipic2_jax.data.prompts import UNREAD, PromptRecord, source_pictures, stack_sources
from unipic2_jax.models import sampling
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.conditioner import tokenize_negative
from unipic2_jax.parallel.mesh import (
    batch_sharding,
    batch_shards,
    described_rows,
    described_whole,
    replicated,
    shard_batch,
)
from unipic2_jax.parallel.processes import gather_json, rows_to_host
from unipic2_jax.pictures import resize as pictures
from unipic2_jax.rl.algorithm import Algorithm, Rollout, join, places
from unipic2_jax.rl.policy import PolicyFn
from unipic2_jax.rl.rollout import draw_noise, rows_of


class Prepared(NamedTuple):
    """What a rollout begins with. Leaves are arrays, or descriptions of some.

    Attributes:
      inputs: 'cond' and, with guidance, 'uncond': conditioning of every sample, leaves [B, ...].
      noise: [B, h, w, C].
      key: of what the rollout draws.
      sigmas: [T + 1].
      part: the sampling batch's number, where a step has several.
    """

    inputs: dict[str, Any]
    noise: Any
    key: Any
    sigmas: Any
    part: Any = None


class Read(NamedTuple):
    """What the host makes of the prompts of a sampling batch."""

    tokens: Any
    negative: Any  # None: there is no guidance
    sources: np.ndarray | None  # [N, H, W, 3] in [-1, 1]


class Sampler:
    """Samples the groups of a step's prompts, one sampling batch at a time.

    Attributes:
      encode: jitted, (params, tokens, negative, sources, key, part=None) -> inputs, from a row per prompt.
      draw_noise: jitted, (key, part=None) -> noise.
      rollout: jitted, see `Algorithm.make_rollout`.
      decode: jitted, (parameters of the VAE, rollout) -> pictures uint8 [B, H, W, 3].
      join: jitted `algorithm.join`.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        bundle: Bundle,
        network_fn: PolicyFn,
        mesh: jax.sharding.Mesh,
        *,
        height: int,
        width: int,
        negative_prompt: str | None = None,
        reference_mode: str = "sample",
        **options: Any,
    ):
        """`options` are those of `Algorithm.make_rollout`.

        Raises:
          ValueError: for pictures of a size that the model cannot draw.
        """
        self.algorithm, self.layout, self.bundle, self.mesh = algorithm, algorithm.layout, bundle, mesh
        self.height, self.width = height, width
        self.negative_prompt, self.reference_mode = negative_prompt, reference_mode
        pictures.check_size(height, width, bundle.vae.config.downsampling * bundle.transformer.config.patch_size)
        self.sigmas = bundle.scheduler.sigmas(algorithm.config.num_steps)
        sharded, placed = batch_sharding(mesh), places(algorithm.rollout_type, mesh)
        self.encode = jax.jit(self._encode, out_shardings=sharded)
        self.draw_noise = jax.jit(self._draw_noise, out_shardings=sharded)
        self.rollout = algorithm.make_rollout(network_fn, out_shardings=placed, **options)
        self.decode = jax.jit(lambda params, rollout: sampling.decode_pictures(bundle.vae, params, rollout.finished))
        self.join = jax.jit(join, out_shardings=(placed, sharded))

    @property
    def guided(self) -> bool:
        return self.algorithm.config.guidance_scale != 1

    def read(self, records: list[PromptRecord]) -> Read:
        """The host's part of `prepare`: nothing is asked of the devices, which may be busy."""
        conditioner = self.bundle.conditioner
        edited = source_pictures(records, self.height, self.width)
        tokens = conditioner.tokenize([record.prompt for record in records], edited)
        negative = tokenize_negative(conditioner, self.negative_prompt, edited) if self.guided else None
        return Read(tokens, negative, stack_sources(edited))

    def prepare(self, params: Any, read: Read, key: jax.Array, part: int) -> Prepared:
        """Conditioning and noise of the samples for a sampling batch's prompts.

        Args:
          params: of the model.
          key: of the step; what is drawn for a sample does not depend on how many are sampled at once.
        """
        whole = replicated(self.mesh)
        encode_key, noise_key, rollout_key = jax.random.split(key, 3)
        tokens, negative = self._place(read.tokens), read.negative
        if negative is not None:
            alone = len(jax.tree.leaves(negative)[0]) == 1
            negative = jax.device_put(negative, whole) if alone else self._place(negative)
        sources = None if read.sources is None else self._place(read.sources)
        number = jax.device_put(np.int32(part), whole) if self.layout.batches > 1 else None
        inputs = self.encode(params, tokens, negative, sources, encode_key, number)
        return Prepared(
            inputs, self.draw_noise(noise_key, number), rollout_key, jax.device_put(self.sigmas, whole), number
        )

    def arguments(self, params: Any, trained: Any, prepared: Prepared) -> tuple[Any, ...]:
        """The arguments of `rollout`; `trained` is what the algorithm samples under."""
        own = (params["transformer"], trained, prepared.inputs, prepared.noise, prepared.key, prepared.sigmas)
        return own if prepared.part is None else (*own, prepared.part)

    def sample(self, params: Any, trained: Any, prepared: Prepared) -> tuple[Rollout, jax.Array]:
        """The rollout and its pictures uint8 [B, H, W, 3], both begun and perhaps not finished."""
        rollout = self.rollout(*self.arguments(params, trained, prepared))
        return rollout, self.decode(params["vae"], rollout)

    def collect(self, drawn: jax.Array) -> np.ndarray:
        """The pictures of this process's devices, uint8 [b, H, W, 3]: each process scores its own."""
        return rows_to_host(drawn, self.mesh)

    def together(self, sampled: list[tuple[Rollout, Any]]) -> tuple[Rollout, Any]:
        """Rollouts of a step with their inputs as one."""
        return sampled[0] if len(sampled) == 1 else self.join(sampled)

    def described(self, params: Any, record: PromptRecord, key: Any) -> tuple[tuple[Any, ...], Prepared]:
        """Arguments of `encode` for prompts like this one, and what comes of `prepare`, as descriptions of arrays."""
        mesh, conditioner, samples = self.mesh, self.bundle.conditioner, self.layout.samples_at_once
        edited = source_pictures([record], self.height, self.width)
        per_prompt = lambda tree: described_rows(tree, self.layout.prompts_at_once, mesh)
        tokens, negative = per_prompt(conditioner.tokenize([record.prompt], edited)), None
        if self.guided:
            negative = tokenize_negative(conditioner, self.negative_prompt, edited)
            own = conditioner.reads_images and edited is not None
            negative = per_prompt(negative) if own else described_whole(negative, mesh)
        sources = None if edited is None else per_prompt(stack_sources(edited))
        encode = (params, tokens, negative, sources, key)
        inputs = described_rows(jax.eval_shape(self.encode, *encode), samples, mesh)
        noise = described_rows(jax.eval_shape(self.draw_noise, key), samples, mesh)
        return encode, Prepared(inputs, noise, key, described_whole(self.sigmas, mesh))

    def described_sample(self, arguments: tuple[Any, ...], inputs: Any) -> tuple[Rollout, Any]:
        """What `together` gives of a step's rollouts with arguments like these, as descriptions of arrays."""
        rollout, parts = self.rollout.eval_shape(*arguments), self.layout.batches
        return (rollout, inputs) if parts == 1 else self.join.eval_shape([(rollout, inputs)] * parts)

    def _encode(
        self, params: Any, tokens: Any, negative: Any, sources: Any, key: jax.Array, part: Any = None
    ) -> dict[str, Any]:
        repeat = lambda x: jnp.repeat(x, self.layout.group_size, axis=0)
        apply, count = self.bundle.conditioner.apply, self.layout.prompts_at_once
        shared = {}
        if sources is not None and self.bundle.conditioner.latent_references:
            # A group shares its reference, so that its samples differ by their own noise alone.
            draw = lambda count: jax.random.split(key, count)
            keys = self._rows(draw, count, part) if self.reference_mode == "sample" else None
            latents = sampling.encode_images(self.bundle.vae, params["vae"], sources, keys)
            shared["references"] = repeat(latents[:, None])
        context, pooled = apply(params["conditioner"], tokens)
        inputs = {"cond": {"context": repeat(context), "pooled": repeat(pooled), **shared}}
        if negative is not None:
            context, pooled = apply(params["conditioner"], negative)
            one = context.shape[0] == 1
            spread = (lambda x: jnp.broadcast_to(x, (self.layout.samples_at_once, *x.shape[1:]))) if one else repeat
            inputs["uncond"] = {"context": spread(context), "pooled": spread(pooled), **shared}
        return inputs

    def _rows(self, draw: Callable[[int], jax.Array], count: int, part: Any) -> jax.Array:
        """What is drawn for the rows of a sampling batch; without a part there is one."""
        return draw(count) if part is None else rows_of(draw, count, part, self.layout.batches)

    def _draw_noise(self, key: jax.Array, part: Any = None) -> jax.Array:
        factor, layout = self.bundle.vae.config.downsampling, self.layout
        size = (self.height // factor, self.width // factor, self.bundle.transformer.config.in_channels)
        count = layout.prompts_at_once if layout.same_latent else layout.samples_at_once
        noise = self._rows(lambda count: draw_noise(key, (count, *size)), count, part)
        return jnp.repeat(noise, layout.samples_at_once // count, axis=0)

    def _place(self, tree: Any) -> Any:
        """One row per prompt, split over the devices when that comes out even."""
        even = self.layout.prompts_at_once % batch_shards(self.mesh) == 0
        return shard_batch(tree, self.mesh) if even else jax.device_put(tree, replicated(self.mesh))


def agreed_records(records: list[PromptRecord], mesh: jax.sharding.Mesh) -> list[PromptRecord]:
    """The records; a picture that one process could not read counts as unread for all of them."""
    own = {str(i): record.error for i, record in enumerate(records) if record.error}
    errors: dict[str, str] = {}
    for found in gather_json(own, mesh):
        errors = found | errors
    return [
        dataclasses.replace(record, image=UNREAD, key=f"{record.prompt}\nunread {i}", error=errors[str(i)])
        if str(i) in errors
        else record
        for i, record in enumerate(records)
    ]
