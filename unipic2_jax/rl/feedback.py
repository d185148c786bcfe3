"""Pictures -> scores -> advantages, with a record of what was scored and a limit to how much may fail."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from unipic2_jax.core.errors import TrainingPaused
from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.parallel.processes import gather_rows, local_rows, row_owners
from unipic2_jax.rewards.audit import write_audit
from unipic2_jax.rewards.combine import combine_rewards, normalize
from unipic2_jax.rewards.scoring import Entry, Scored, Scorer, Span
from unipic2_jax.rl.advantages import group_advantages
from unipic2_jax.rl.algorithm import Layout
from unipic2_jax.rl.config import RLConfig

NOT_YET = -1  # in a window of failures: a step that has not been taken


class Feedback:
    """Asks the rewards of a stage about its samples.

    Attributes:
      audit: the folder for pictures and raw scores, and of how many steps one is kept; 0: none.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        config: RLConfig,
        layout: Layout,
        mesh: jax.sharding.Mesh,
        *,
        audit: tuple[Path, int],
        tell: Callable[[str], None],
        span: Span = contextlib.nullcontext,
    ):
        """`tell` takes sentences about a step, 'step 3: ...'; in a `span` of this name is what a reward does about a part."""
        self.span = span
        self.scorer, self.config, self.layout, self.mesh = Scorer(entries), config, layout, mesh
        self.audit_folder, self.audit_every = audit
        self.tell = tell
        self._told: set[str] = set()  # rewards whose first failure was told in this process

    def start(
        self, images: np.ndarray, records: list[PromptRecord], step: int, part: int, over: threading.Event
    ) -> Callable[[], Scored]:
        """Scores of a sampling batch from all processes, each of which begins now with its own pictures.

        Args:
          images: uint8 [b, H, W, 3], of this process's devices.
          records: of the sampling batch.
          over: is set by an error in a reward; the parts of a step share it.
        """
        mesh, count = self.mesh, self.layout.samples_at_once
        rows = local_rows(mesh, count)
        repeated = [records[row // self.layout.group_size] for row in rows]
        result = self.scorer.start(list(images), repeated, over, lambda what: self.span(f"{what} {part}"))
        heard = row_owners(mesh)[jax.process_index()] == jax.process_index()
        audited = heard and self.audit_every and step % self.audit_every == 0

        def scored() -> Scored:
            own = result()
            if audited:
                write_audit(self.audit_folder / f"{step:06d}", part * count + rows, images, repeated, own)
            for name, sentences in own.errors.items():
                if sentences and name not in self._told:
                    self._told.add(name)
                    self.tell(f"step {step}: the reward '{name}' failed: {next(iter(sentences.values()))}")
            everywhere = lambda tree: {name: gather_rows(values, mesh, count) for name, values in tree.items()}
            return own._replace(values=everywhere(own.values), asked=everywhere(own.asked))

        return scored

    def advantages(self, parts: list[Scored], records: list[PromptRecord]) -> tuple[np.ndarray, dict[str, float]]:
        """Advantages float32 [B] and statistics of all samples of a step; a statistic over nothing is left out."""
        entries, config = self.scorer.entries, self.config
        groups = [record.key for record in records for _ in range(self.layout.group_size)]
        values, asked = (
            {name: np.concatenate([getattr(part, field)[name] for part in parts]) for name in entries}
            for field in ("values", "asked")
        )
        scaled = {name: normalize(values[name], groups, entries[name].normalize) for name, _ in config.weights}
        total = combine_rewards(scaled, config.weights, asked)
        advantages, stats = group_advantages(total, groups, global_std=config.global_std, clip=config.adv_clip_max)
        metrics = {"reward": stats.pop("reward_mean"), **stats}
        for name, scores in values.items():
            valid = scores[~np.isnan(scores)]
            metrics[f"reward_{name}_failed"] = float(asked[name].sum() - len(valid))
            if len(valid):
                metrics |= {f"reward_{name}": float(valid.mean()), f"reward_{name}_std": float(valid.std())}
        return advantages, {name: value for name, value in metrics.items() if not np.isnan(value)}


def no_failures(window: int) -> np.ndarray:
    """The window of failures before the first step, int32 [window]."""
    return np.full(window, NOT_YET, np.int32)


def count_failures(
    failures: np.ndarray, failed: int, samples: int, budget: float, step: int, stage: str, rewards: str
) -> np.ndarray:
    """The window of failures after a step.

    Args:
      failures: int32 [window], samples without a score in each of the last steps, the newest last.
      failed: in this step, of so many `samples`.
      budget: the share of all samples of a full window that may fail.
      stage, rewards: names, for the message.

    Raises:
      TrainingPaused: when more failed. A step that keeps within the budget itself is never the one to stop at: the run goes on
        as soon as what was broken works again.
    """
    failures = np.append(failures[1:], np.int32(failed))
    share = failures.sum() / (len(failures) * samples)
    if (failures != NOT_YET).all() and share > budget and failed > budget * samples:
        raise TrainingPaused(
            f"{share:.0%} of the samples of stage '{stage}' could not be scored in the {len(failures)} steps up to step {step}; "
            f"repair the reward ({rewards}) or the pictures to edit, then run the same command."
        )
    return failures
