"""A model of a few thousand weights, a source of prompts and a reward for brightness, to reinforce in seconds."""

import dataclasses
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unipic2_jax.data.prompts import SOURCES, PromptRecord
from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.models.sd3.vae import AutoencoderKL, VAEConfig
from unipic2_jax.rewards.base import REWARDS, Reward, Scores
from unipic2_jax.training.config import make_config
from unipic2_jax.weights.precision import PRECISIONS

SIZE = 4  # pixels; 4 x 4 latents, 4 tokens


@dataclasses.dataclass
class WordConditioner:
    """One embedding per character code."""

    joint_attention_dim: int = 16
    pooled_dim: int = 8
    context_length = 3
    reads_images = False
    latent_references = True

    def default_negative(self, is_edit):
        return ""

    def tokenize(self, prompts, images=None):
        return {"ids": np.array([[ord(c) % 16 for c in prompt.ljust(3)[:3]] for prompt in prompts], np.int32)}

    def apply(self, params, tokens):
        context = params["table"][tokens["ids"]]
        return context, context.mean(axis=1)[:, : self.pooled_dim]


class ToySource:
    def __init__(self, seed=0, edit=False):
        self.seed, self.edit = seed, edit

    def batch(self, step, count):
        rng = np.random.default_rng((self.seed, step))
        records = []
        for index in range(count):
            image = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8) if self.edit else None
            records.append(
                PromptRecord("abcdefgh"[rng.integers(8)] + str(index), image, {"tag": "even" if index % 2 else "odd"})
            )
        return records


class Brightness(Reward):
    """Mean of the pixels; `trouble` is what the tests make it do instead."""

    trouble: Any = None

    def score(self, images, records):
        assert len(images) == len(records) and images[0].dtype == np.uint8
        values = np.array([image.mean() / 255 for image in images])
        values = Brightness.trouble(values) if Brightness.trouble else values
        return Scores(values, {"dark": 1 - values})


SOURCES["toy"], REWARDS["brightness"] = ToySource, Brightness


def stop_at_call(number):
    """Trouble that asks the process to end at the reward's call of this number."""
    calls = iter(range(10**6))

    def trouble(values):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    return trouble


def load(config=None, mesh=None):
    precision = PRECISIONS[config.precision if config else "float32"]
    transformer = MMDiT(
        MMDiTConfig(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=4,
            dual_attention_layers=(),
        ),
        remat="none",
        dtype=precision.compute,
    )
    vae = AutoencoderKL(
        VAEConfig(latent_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, sample_size=SIZE),
        dtype=precision.compute,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = jax.eval_shape(
        lambda: {
            "transformer": transformer.init(
                keys[0], jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros((1, 3, 16)), jnp.zeros((1, 8))
            )["params"],
            "vae": vae.init(keys[1], jnp.zeros((1, SIZE, SIZE, 3)))["params"],
            "conditioner": {"table": jnp.zeros((16, 16))},
        }
    )
    rng = np.random.default_rng(0)
    scale = lambda x: 1 / np.sqrt(np.prod(x.shape[-2:-1] or (1,)))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale(x), x.shape), jnp.float32), shapes)
    params = precision.hold(params)
    if mesh is not None:
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    return Bundle(transformer, vae, WordConditioner(), FlowMatchConfig(), params)


def save(bundle, folder, changed):
    del changed
    folder.mkdir(parents=True)
    flat = {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(bundle.params)}
    np.savez(folder / "params.npz", **flat)


def stage(edit=False, **fields):
    """A GRPO stage of 4 prompts x 4 samples, 4 steps; `fields` over it."""
    source = {"kind": "toy", "edit": edit}
    evaluation = {"source": source, "rewards": {"brightness": {}}, "num_prompts": 6, "samples": 2, "num_steps": 3}
    values = {
        "kind": "grpo",
        "steps": 3,
        "save_every": 1,
        "source": source,
        "rewards": {"brightness": {"weight": 1.0}},
        "evaluations": {"toy": {**evaluation, "height": SIZE, "width": SIZE, "batch_size": 8}},
        "num_prompts": 4,
        "sampling_batches": 1,
        "height": SIZE,
        "width": SIZE,
        "batch_branches": True,
        "lora": {"rank": 4, "alpha": 8.0},
        "grpo": {"num_steps": 4, "group_size": 4, "guidance_scale": 2.0, "kl_beta": 0.01, "ema_interval": 1},
        "optimizer": {"lr": 0.03},
    }
    return {**values, **fields, "grpo": {**values["grpo"], **fields.get("grpo", {})}}


def config(**stages):
    return make_config({"schedule": tuple(stages), "stages": stages})
