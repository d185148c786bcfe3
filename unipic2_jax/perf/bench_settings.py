"""What `perf.bench` measures: sizes, shapes, works, and the FLOPs of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from unipic2_jax.flow.loss import flow_step_flops
from unipic2_jax.models.attention import IMPLEMENTATIONS
from unipic2_jax.models.registry import SIZES
from unipic2_jax.models.remat import POLICIES
from unipic2_jax.models.sd3.flops import forward_flops
from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.rl.algorithm import Passes
from unipic2_jax.rl.config import GRPOConfig

# SD3.5-Medium in small: the same heads and parts, a third of the depth and half the width. About 130M parameters, so that a
# training step takes seconds on two cores.
MID = MMDiTConfig(
    sample_size=64,
    num_layers=6,
    num_attention_heads=12,
    joint_attention_dim=1024,
    caption_projection_dim=768,
    pooled_projection_dim=768,
    pos_embed_max_size=64,
    dual_attention_layers=(0, 1, 2),
)
TRANSFORMERS = {"mid": MID, **{name: sizes.networks["transformer"] for name, sizes in SIZES.items()}}
WORKS = ("product", "forward", "flow", "rollout", "update")
# Whole pictures, see `perf.bench_pictures`; only where they are asked for.
PICTURES = ("t2i", "edit")
DTYPES = ("float32", "bfloat16")
DOWNSAMPLING, SHIFT, ALPHA = 8, 3.0, 64.0  # of SD3.5's VAE and schedule, of the paper's LoRA


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      size: of the transformer, one of TRANSFORMERS.
      height, width: of the pictures, pixels.
      batch: samples.
      micro_batch: samples that the update takes at a time; None: all.
      references: pictures that an edit starts from, as large as the target.
      text_tokens: of the conditioning.
      lora_rank: of rollout and update; num_steps: of the rollout, of which the update trains all but the last.
      guidance_scale: of both; 1 for none.
      dtype: of the arithmetic. Weights that are trained are float32, frozen ones have this dtype.
      remat: what of a block is kept for the backward pass, see `models.remat`; PyTorch checkpoints blocks under 'full'.
      attention: see `models.attention`; PyTorch's is its scaled_dot_product_attention.
      works: which of WORKS.

    Raises:
      ValueError: when a value is not possible.
    """

    size: str = "mid"
    height: int = 256
    width: int = 256
    batch: int = 4
    micro_batch: int | None = None
    references: int = 1
    text_tokens: int = 154
    lora_rank: int = 32
    num_steps: int = 3
    guidance_scale: float = 1.0
    dtype: str = "float32"
    remat: str = "dots"
    attention: str = "auto"
    works: Sequence[str] = WORKS

    def __post_init__(self) -> None:
        known = {"size": TRANSFORMERS, "dtype": DTYPES, "attention": IMPLEMENTATIONS, "remat": tuple(POLICIES)}
        for field, names in known.items():
            if getattr(self, field) not in names:
                raise ValueError(f"There is no {field} '{getattr(self, field)}'; choose one of {', '.join(names)}.")
        if unknown := [work for work in self.works if work not in WORKS + PICTURES]:
            raise ValueError(f"There is no work '{unknown[0]}'; choose from {', '.join(WORKS + PICTURES)}.")
        least = {"batch": 1, "references": 0, "text_tokens": 1, "lora_rank": 1, "num_steps": 2}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {low}.")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise ValueError(f"micro_batch is {self.micro_batch}; it must divide the batch of {self.batch}.")
        pixels = DOWNSAMPLING * self.transformer.patch_size
        most = pixels * self.transformer.pos_embed_max_size
        for field in ("height", "width"):
            if not 0 < getattr(self, field) <= most or getattr(self, field) % pixels:
                raise ValueError(
                    f"{field} is {getattr(self, field)}; '{self.size}' takes multiples of {pixels} up to {most} pixels."
                )

    @property
    def transformer(self) -> MMDiTConfig:
        """Its sizes."""
        return TRANSFORMERS[self.size]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """The shape of the batch, [B, h, w, C]."""
        height, width = self.height // DOWNSAMPLING, self.width // DOWNSAMPLING
        return self.batch, height, width, self.transformer.in_channels

    @property
    def tokens(self) -> int:
        """The tokens of one picture."""
        return self.height * self.width // (DOWNSAMPLING * self.transformer.patch_size) ** 2

    @property
    def grpo(self) -> GRPOConfig:
        """One optimizer step, which is on-policy whatever was computed before: its old log-probabilities are its own."""
        return GRPOConfig(
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            updates_per_rollout=1,
            micro_batch=self.micro_batch,
        )

    @property
    def product_shape(self) -> tuple[int, int, int]:
        """The shape of the matrices that are multiplied, [n, k] x [k, m]: those into the feed-forward layers' hidden units."""
        tokens = self.batch * self.tokens * (1 + self.references)
        return tokens, self.transformer.width, 4 * self.transformer.width

    def flops(self) -> dict[str, int]:
        """Model FLOPs of each work."""
        forward = forward_flops(self.transformer, self.tokens, self.text_tokens, self.tokens * self.references)
        rows, depth, columns = self.product_shape
        evaluations = self.batch * (1 if self.guidance_scale == 1 else 2)
        trained = evaluations * self.grpo.trained_steps
        passes = Passes(evaluations * self.num_steps, trained, trained * (self.grpo.kl_beta > 0))
        rollout, update = passes.flops(forward)
        return {
            "product": 2 * rows * depth * columns,
            "forward": self.batch * forward,
            "flow": flow_step_flops(forward, self.batch, trains_weights=True),
            "rollout": rollout,
            "update": update,
        }
