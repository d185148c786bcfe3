"""The works of `perf.bench` in PyTorch: diffusers' transformer, peft's LoRA, torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from unipic2_jax.models.sd3 import mmdit_names as mmdit_weights
from unipic2_jax.models.sd3.lora import LORA_TARGETS
from unipic2_jax.models.sd3.lora_writing import updates
from unipic2_jax.perf.bench import Inputs, Runner, draw_weights, flow_optimizer, grpo_optimizer
from unipic2_jax.perf.bench_settings import ALPHA, Settings
from unipic2_jax.weights import table


class Theirs:
    """The runners, with our weights and inputs.

    Args:
      device: 'cpu' or 'cuda'.
      compiled: whether each block goes through torch.compile.
    """

    def __init__(self, settings: Settings, inputs: Inputs, device: str, compiled: bool = False):
        self.name = "torch.compile" if compiled else "PyTorch"
        self.settings, self.inputs, self.compiled = settings, inputs, compiled
        self.device, self.dtype = torch.device(device), getattr(torch, settings.dtype)
        self.grpo = settings.grpo
        self.latents, self.noise = self._picture(inputs.latents), self._picture(inputs.corruption["noise"])
        self.step_noise = self._picture(inputs.step_noise)
        self.sigma, self.sigmas = self._tensor(inputs.corruption["sigma"]), self._tensor(inputs.sigmas)
        given = () if inputs.references is None else np.asarray(inputs.references).swapaxes(0, 1)
        self.references = [self._picture(reference) for reference in given]
        self.conditioning, self.unconditional = (
            tuple(map(self._tensor, branch)) for branch in (inputs.conditioning, inputs.unconditional)
        )

    def runner(self, work: str) -> Runner:
        """The runner of one of WORKS."""
        return getattr(self, work)()

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    def _picture(self, array: Any) -> torch.Tensor:
        """[..., h, w, C] -> [..., C, h, w]."""
        return self._tensor(array).movedim(-1, -3).contiguous()

    def _model(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        config = self.settings.transformer
        with torch.device("meta"):
            model = SD3Transformer2DModel(**config.to_dict())
        named = table.to_torch(mmdit_weights.rules(config), draw_weights(config))
        state = {name: self._tensor(array).to(dtype) for name, array in named}
        model.load_state_dict(state, strict=True, assign=True)
        if self.compiled:
            for block in model.transformer_blocks:
                block.compile()
        return model

    def _policy(self) -> SD3Transformer2DModel:
        """The frozen model with the LoRA."""
        model, rank = self._model(self.dtype).requires_grad_(False), self.settings.lora_rank
        targets = [f"{name}.0" if name.endswith("to_out") else name for name in LORA_TARGETS]
        model.add_adapter(LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets))
        for name, leaf in model.named_parameters():
            if "lora_" in name:  # trained, and so float32 like ours
                leaf.data = leaf.data.float()
        state = {}
        for layer, update in updates(self.inputs.lora, ALPHA, self.settings.transformer).items():
            state[f"{layer}.lora_A.default.weight"] = self._tensor(update.down)
            state[f"{layer}.lora_B.default.weight"] = self._tensor(update.up)
        if left := model.load_state_dict(state, strict=False).unexpected_keys:
            raise RuntimeError(f"peft has no LoRA for {left[0]}.")
        for name, leaf in model.named_parameters():
            leaf.requires_grad_("lora_" in name)
        return model

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.settings.dtype != "float32")

    def _velocity(
        self,
        model: SD3Transformer2DModel,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        branch: tuple[torch.Tensor, ...],
        rows: slice = slice(None),
    ) -> torch.Tensor:
        """Velocity [B, C, h, w], float32: diffusers' own parts, with the references before the target as Kontext has it.

        `rows` are those of the whole batch that `latents` belong to.
        """
        context, pooled = (given[rows] for given in branch)
        recomputed = self.settings.remat == "full" and torch.is_grad_enabled()
        with self._autocast():
            references = [reference[rows] for reference in self.references]
            return joint_velocity(model, latents, 1000 * sigma, context, pooled, references, recomputed)

    def _guided(
        self, model: SD3Transformer2DModel, latents: torch.Tensor, sigma: torch.Tensor, rows: slice = slice(None)
    ) -> torch.Tensor:
        given, scale = self._velocity(model, latents, sigma, self.conditioning, rows), self.settings.guidance_scale
        if scale == 1:
            return given
        other = self._velocity(model, latents, sigma, self.unconditional, rows)
        return other + scale * (given - other)

    def product(self) -> Runner:
        rows, depth, columns = self.settings.product_shape
        left, right = (
            torch.ones(*shape, dtype=self.dtype, device=self.device) for shape in ((rows, depth), (depth, columns))
        )
        return lambda: {"product": (left @ right)[0, :1].float().cpu().numpy()}

    def forward(self) -> Runner:
        model = self._model(self.dtype)

        @torch.no_grad()
        def run() -> dict[str, np.ndarray]:
            velocity = self._velocity(model, self.latents, self.sigma, self.conditioning)
            return {"velocity": velocity.movedim(1, -1).cpu().numpy()}

        return run

    def _optimizer(self, parameters: list[torch.Tensor], fields: Any) -> Callable[[], np.ndarray]:
        """What clips, steps, and returns the norm before it was clipped. `fused` is PyTorch's fastest."""
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[fields.name]
        decay = {"weight_decay": fields.weight_decay} if fields.name == "adamw" else {}
        optimizer = kind(parameters, fields.lr, betas=fields.betas, eps=fields.eps, fused=True, **decay)

        def step() -> np.ndarray:
            norm = torch.nn.utils.clip_grad_norm_(parameters, fields.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return norm.cpu().numpy()

        return step

    def flow(self) -> Runner:
        model = self._model(torch.float32).train()
        step = self._optimizer(list(model.parameters()), flow_optimizer())

        def run() -> dict[str, np.ndarray]:
            sigma = self.sigma[:, None, None, None]
            noisy = (1 - sigma) * self.latents + sigma * self.noise
            velocity = self._velocity(model, noisy, self.sigma, self.conditioning)
            loss = torch.mean((velocity - (self.noise - self.latents)) ** 2)
            loss.backward()
            return {"gradient_norm": step(), "loss": loss.detach().cpu().numpy()}

        return run

    # The SDE and the objective as Flow-GRPO's code has them.

    def _mean_std(
        self, velocity: torch.Tensor, x: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The step with this number: mean [B, C, h, w], standard deviation and diffusion, scalars."""
        sigma, dt = self.sigmas[index], self.sigmas[index + 1] - self.sigmas[index]
        below_one = self.sigmas[1] if index == 0 else sigma
        s = torch.sqrt(sigma / (1 - below_one)) * self.grpo.sde.noise_level
        pull = s**2 / (2 * sigma)
        return x * (1 + pull * dt) + velocity * (1 + pull * (1 - sigma)) * dt, s * torch.sqrt(-dt), s

    @staticmethod
    def _log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """[B], the mean over a sample's elements."""
        value = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return value.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def _sample(self, model: SD3Transformer2DModel) -> list[torch.Tensor]:
        """Latents of T + 1 steps; the log-probabilities of T are computed, as a rollout's are, and not needed here."""
        latents = [self.noise]
        for index in range(self.settings.num_steps):
            velocity = self._guided(model, latents[-1], self.sigmas[index])
            mean, std, _ = self._mean_std(velocity, latents[-1], index)
            latents.append(mean + std * self.step_noise[index])
            self._log_prob(latents[-1], mean, std)
        return latents

    def rollout(self) -> Runner:
        model = self._policy()
        return lambda: {"latents": self._sample(model)[-1].movedim(1, -1).cpu().numpy()}

    def update(self) -> Runner:
        model, config = self._policy(), self.grpo
        latents = self._sample(model)
        advantages = self._tensor(self.inputs.advantages).clamp(-config.adv_clip_max, config.adv_clip_max)
        step = self._optimizer([leaf for leaf in model.parameters() if leaf.requires_grad], grpo_optimizer())

        def losses(index: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            """Mean loss and mean KL of a step of these samples."""
            x, x_next, sigma, advantage = (
                latents[index][rows],
                latents[index + 1][rows],
                self.sigmas[index],
                advantages[rows],
            )
            model.disable_adapters()
            with torch.no_grad():
                reference_mean, _, _ = self._mean_std(self._guided(model, x, sigma, rows), x, index)
            model.enable_adapters()
            mean, std, s = self._mean_std(self._guided(model, x, sigma, rows), x, index)
            log_prob = self._log_prob(x_next, mean, std)
            ratio = torch.exp(log_prob - log_prob.detach())  # on-policy, as ours
            clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
            kl = ((mean - reference_mean) ** 2 / (2 * s**2)).mean()
            return torch.maximum(-advantage * ratio, -advantage * clipped).mean() + config.kl_beta * kl, kl

        parts = 1 if config.micro_batch is None else self.settings.batch // config.micro_batch

        def run() -> dict[str, np.ndarray]:
            outputs = []
            for index in range(config.trained_steps):
                for part in range(parts):
                    loss, kl = losses(index, slice(part, None, parts))
                    (loss / (config.trained_steps * parts)).backward()
                    outputs.append(torch.stack([loss, kl]).detach())
            loss, kl = torch.stack(outputs).mean(dim=0).cpu().numpy()
            return {"gradient_norm": step(), "loss": loss, "kl": kl}

        return run


def joint_velocity(
    model: SD3Transformer2DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    references: list[torch.Tensor],
    recomputed: bool = False,
) -> torch.Tensor:
    """Velocity [B, C, h, w], float32: diffusers' own parts, with the references before the target as Kontext has it.

    Args:
      timestep: scalar or [B], of 1000.
      references: [B, C, h, w] each.
      recomputed: blocks are checkpointed.
    """
    batch, _, height, width = latents.shape
    patch = model.config.patch_size
    target = model.pos_embed(latents)
    x = torch.cat([*(model.pos_embed(reference) for reference in references), target], dim=1)
    emb = model.time_text_embed(timestep.expand(batch), pooled)
    text = model.context_embedder(context)
    for block in model.transformer_blocks:
        if recomputed:
            text, x = checkpoint(block, x, text, emb, use_reentrant=False)
        else:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=emb)
    x = model.proj_out(model.norm_out(x[:, -target.shape[1] :], emb))
    x = x.float().reshape(batch, height // patch, width // patch, patch, patch, model.out_channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, model.out_channels, height, width)
