"""What a reinforcement stage is made of. Defaults: the UniPic 2.0 report, and where it is silent Flow-GRPO's code."""

from __future__ import annotations

import dataclasses
import math

from unipic2_jax.flow.sde import SDEConfig

KL_KINDS = ("mean", "velocity")
OLD_LOG_PROBS = ("trainer", "sampler")


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Hyper-parameters of Flow-GRPO and its variants.

    Raises:
      ValueError: when a field is out of range or two fields contradict each other.
    """

    num_steps: int = 10  # sampling steps T of a rollout
    group_size: int = 16  # samples per prompt, G
    sde: SDEConfig = dataclasses.field(default_factory=SDEConfig)
    guidance_scale: float = 3.5  # 1 means no guidance
    stop_gradient_uncond: bool = False  # do not differentiate the unconditional branch
    # Whose log-probabilities ratios are taken against. 'trainer': those of the program that trains, so that the first update's
    # ratios are 1 to the bit; 'sampler': the rollout's, which that program's agree with up to rounding only.
    old_log_probs: str = "trainer"
    clip_range: float = 1e-4
    adv_clip_max: float = 5.0
    global_std: bool = False  # divide advantages by the std of the whole batch, not of the group
    skip_zero_advantage: bool = False  # leave samples whose advantage is 0 out of the loss and the KL
    kl_beta: float = 0.04  # 0 leaves the reference policy out altogether
    # 'mean': distance of the steps' means in units of their noise; 'velocity': of the plain velocities. With cps the
    # last steps have almost no noise, so that 'mean' lets them outweigh all others: prefer 'velocity' there.
    kl_on: str = "mean"
    kl_divide_by_dt: bool = False  # the true Gaussian KL; the reference code leaves |dt| out
    timestep_fraction: float = 0.99  # int(T * fraction) first steps are trained
    window: tuple[int, tuple[int, int]] | None = None  # (size, (low, high)): SDE steps, drawn inside [low, high)
    cfg_in_window: bool = True  # False: no guidance in the window's steps
    guard: bool = False  # GRPO-Guard: ratios corrected per sample, steps weighted by 1 / |dt|
    updates_per_rollout: int = 2  # optimizer steps; each takes an equal part of the rollout's samples
    micro_batch: int | None = None  # samples per forward/backward pass; None: all of an update's
    ema_decay: float = 0.9
    ema_interval: int = 8  # optimizer steps between EMA updates
    weights: tuple[tuple[str, float], ...] = ()  # (reward name, weight); empty: the only reward, with weight 1

    def __post_init__(self):
        def require(ok: bool, sentence: str):
            if not ok:
                raise ValueError(f"GRPO: {sentence}.")

        require(self.num_steps >= 1, f"num_steps is {self.num_steps}; use at least 1")
        require(self.group_size >= 2, f"group_size is {self.group_size}; advantages need at least 2 samples per group")
        require(
            self.old_log_probs in OLD_LOG_PROBS,
            f"old_log_probs is {self.old_log_probs!r}; choose one of {', '.join(OLD_LOG_PROBS)}",
        )
        require(self.clip_range > 0, f"clip_range is {self.clip_range}; it must be above 0")
        require(self.adv_clip_max > 0, f"adv_clip_max is {self.adv_clip_max}; it must be above 0")
        require(self.kl_beta >= 0, f"kl_beta is {self.kl_beta}; it must be 0 or more")
        require(self.kl_on in KL_KINDS, f"kl_on is {self.kl_on!r}; choose one of {', '.join(KL_KINDS)}")
        require(
            not self.kl_divide_by_dt or (self.kl_on == "mean" and self.sde.kind == "flow_grpo"),
            "kl_divide_by_dt belongs to kl_on='mean' with the flow_grpo SDE; switch it off",
        )
        require(
            not self.guard or self.sde.kind == "flow_grpo", "guard is defined for the flow_grpo SDE; switch one of them"
        )
        require(
            0 < self.timestep_fraction <= 1, f"timestep_fraction is {self.timestep_fraction}; it must lie in (0, 1]"
        )
        require(
            self.trainable_steps >= 1,
            f"timestep_fraction {self.timestep_fraction} of {self.num_steps} steps trains none; raise one of them",
        )
        require(
            self.sde.kind != "cps" or self.trainable_steps < self.num_steps,
            "the last cps step has no noise and cannot be trained; lower timestep_fraction",
        )
        if self.window is not None:
            size, (low, high) = self.window
            require(
                size >= 1 and low >= 0 and low + size <= high <= self.trainable_steps,
                f"window {self.window} must be (size, (low, high)) with size >= 1, low + size <= high and "
                f"0 <= low, high <= {self.trainable_steps} (the trainable steps)",
            )
        require(
            self.cfg_in_window or self.window is not None,
            "cfg_in_window=False needs a window; set one, or guidance_scale=1 for no guidance at all",
        )
        require(self.updates_per_rollout >= 1, f"updates_per_rollout is {self.updates_per_rollout}; use at least 1")
        require(self.micro_batch is None or self.micro_batch >= 1, f"micro_batch is {self.micro_batch}; use at least 1")
        require(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        require(self.ema_interval >= 1, f"ema_interval is {self.ema_interval}; use at least 1")
        names = [name for name, _ in self.weights]
        require(len(set(names)) == len(names), f"weights names a reward twice: {', '.join(names)}")
        require(all(math.isfinite(w) for _, w in self.weights), f"weights {self.weights} must be finite")

    @property
    def trainable_steps(self) -> int:
        """The steps that may be trained are the first `int(T * timestep_fraction)` (Flow-GRPO's code)."""
        return int(self.num_steps * self.timestep_fraction)

    @property
    def trained_steps(self) -> int:
        """How many steps of a rollout are trained: K."""
        return self.trainable_steps if self.window is None else self.window[0]

    @property
    def keeps_means(self) -> bool:
        """Whether a rollout keeps the means of its steps: GRPO-Guard compares with them where the trainer has none of its own."""
        return self.guard and self.old_log_probs == "sampler"
