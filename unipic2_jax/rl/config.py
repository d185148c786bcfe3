"""What a reinforcement stage is made of: the fields that all algorithms have, and GRPO's.

Defaults: the UniPic 2.0 report, and where it is silent Flow-GRPO's code.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from unipic2_jax.flow.sde import SDEConfig

KL_KINDS = ("mean", "velocity")
OLD_LOG_PROBS = ("trainer", "sampler")
TRUSTS = ("clip", "dppo")


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """The hyper-parameters that every algorithm has.

    Raises:
      ValueError: when a field is out of range; the sentence begins with the algorithm's `title`.
    """

    title: ClassVar[str] = "RL"

    num_steps: int = 10  # sampling steps T of a rollout
    group_size: int = 16  # samples per prompt, G
    guidance_scale: float = 3.5  # 1 means no guidance
    adv_clip_max: float = 5.0
    global_std: bool = False  # divide advantages by the std of the whole batch, not of the group
    kl_beta: float = 0.04  # 0 leaves the reference policy out altogether
    timestep_fraction: float = 0.99  # int(T * fraction) noise levels of a sample are trained
    updates_per_rollout: int = 2  # optimizer steps; each takes an equal part of the rollout's samples
    micro_batch: int | None = None  # samples per forward/backward pass; None: all of an update's
    ema_decay: float = 0.9
    ema_interval: int = 8  # optimizer steps between EMA updates
    weights: tuple[tuple[str, float], ...] = ()  # (reward name, weight); empty: the only reward, with weight 1

    def __post_init__(self) -> None:
        require = self.require
        require(self.num_steps >= 1, f"num_steps is {self.num_steps}; use at least 1")
        require(self.group_size >= 2, f"group_size is {self.group_size}; advantages need at least 2 samples per group")
        require(self.adv_clip_max > 0, f"adv_clip_max is {self.adv_clip_max}; it must be above 0")
        require(self.kl_beta >= 0, f"kl_beta is {self.kl_beta}; it must be 0 or more")
        require(
            0 < self.timestep_fraction <= 1, f"timestep_fraction is {self.timestep_fraction}; it must lie in (0, 1]"
        )
        require(
            self.trainable_steps >= 1,
            f"timestep_fraction {self.timestep_fraction} of {self.num_steps} steps trains none; raise one of them",
        )
        require(self.updates_per_rollout >= 1, f"updates_per_rollout is {self.updates_per_rollout}; use at least 1")
        require(self.micro_batch is None or self.micro_batch >= 1, f"micro_batch is {self.micro_batch}; use at least 1")
        require(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        require(self.ema_interval >= 1, f"ema_interval is {self.ema_interval}; use at least 1")
        names = [name for name, _ in self.weights]
        require(len(set(names)) == len(names), f"weights names a reward twice: {', '.join(names)}")
        require(all(math.isfinite(w) for _, w in self.weights), f"weights {self.weights} must be finite")

    def require(self, ok: bool, sentence: str) -> None:
        """Raises a ValueError with the sentence when something is not so."""
        if not ok:
            raise ValueError(f"{self.title}: {sentence}.")

    @property
    def trainable_steps(self) -> int:
        """`int(T * timestep_fraction)`, as in Flow-GRPO's code."""
        return int(self.num_steps * self.timestep_fraction)

    @property
    def trained_steps(self) -> int:
        """At how many noise levels a sample is trained: K."""
        return self.trainable_steps


@dataclasses.dataclass(frozen=True)
class GRPOConfig(RLConfig):
    """Hyper-parameters of Flow-GRPO and its variants. Of the T steps of a rollout the first `trainable_steps` may be trained.

    Raises:
      ValueError: when a field is out of range or two fields contradict each other.
    """

    title: ClassVar[str] = "GRPO"

    sde: SDEConfig = dataclasses.field(default_factory=SDEConfig)
    stop_gradient_uncond: bool = False  # do not differentiate the unconditional branch
    # Whose log-probabilities ratios are taken against. 'trainer': those of the program that trains, so that the first update's
    # ratios are 1 to the bit; 'sampler': the rollout's, which that program's agree with up to rounding only.
    old_log_probs: str = "trainer"
    # What keeps the policy near the old one. 'clip': ratios beyond `clip_range`; 'dppo': samples whose steps have moved by
    # `trust_tau` or more (Flow-DPPO), see `objective.grpo_loss`. Either holds back only what would move further.
    trust: str = "clip"
    clip_range: float = 1e-4
    trust_tau: float = 1e-5
    skip_zero_advantage: bool = False  # leave samples whose advantage is 0 out of the loss and the KL
    # 'mean': distance of the steps' means in units of their noise; 'velocity': of the plain velocities. With cps the
    # last steps have almost no noise, so that 'mean' lets them outweigh all others: prefer 'velocity' there.
    kl_on: str = "mean"
    kl_divide_by_dt: bool = False  # the true Gaussian KL; the reference code leaves |dt| out
    window: tuple[int, tuple[int, int]] | None = None  # (size, (low, high)): SDE steps, drawn inside [low, high)
    cfg_in_window: bool = True  # False: no guidance in the window's steps
    guard: bool = False  # GRPO-Guard: ratios corrected per sample, steps weighted by 1 / |dt|

    def __post_init__(self) -> None:
        super().__post_init__()
        require, plain = self.require, self.sde.kind == "flow_grpo"
        for field, known in {"old_log_probs": OLD_LOG_PROBS, "trust": TRUSTS, "kl_on": KL_KINDS}.items():
            value = getattr(self, field)
            require(value in known, f"{field} is {value!r}; choose one of {', '.join(known)}")
        require(self.clip_range > 0, f"clip_range is {self.clip_range}; it must be above 0")
        require(self.trust_tau > 0, f"trust_tau is {self.trust_tau}; it must be above 0")
        require(
            not self.kl_divide_by_dt or (self.kl_on == "mean" and plain),
            "kl_divide_by_dt belongs to kl_on='mean' with the flow_grpo SDE; switch it off",
        )
        require(not self.guard or plain, "guard is defined for the flow_grpo SDE; switch one of them")
        require(
            self.trust != "dppo" or (plain and not self.guard),
            "trust='dppo' is defined for the flow_grpo SDE without guard; switch one of them",
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

    @property
    def trained_steps(self) -> int:
        return self.trainable_steps if self.window is None else self.window[0]

    @property
    def compares_means(self) -> bool:
        """Whether the objective looks at how far the means of the steps are from the old policy's."""
        return self.guard or self.trust == "dppo"

    @property
    def keeps_means(self) -> bool:
        """Whether a rollout keeps the means of its steps: they are looked at where the trainer has none of its own."""
        return self.compares_means and self.old_log_probs == "sampler"
