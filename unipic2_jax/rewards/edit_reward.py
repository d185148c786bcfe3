"""EditReward as a reward: it judges on the devices that the model is trained on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import cast

import numpy as np
from jax.sharding import Mesh

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.models.edit_reward.model import EditRewardModel, Questions, check_combine, combine
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.rewards.base import REWARDS, Reward, Scores
from unipic2_jax.weights.precision import PRECISIONS, Precision, as_precision

# A run's stages and evaluations ask the same judge; it is in memory once, for as long as one of them is.
_LOADED: weakref.WeakValueDictionary[tuple[str, Mesh, Precision], EditRewardModel] = weakref.WeakValueDictionary()


@REWARDS.register("editreward")
class EditRewardReward(Reward):
    """Scores in [0, 1] of an EditReward; the folder is checked at once and read when it is first asked.

    Args:
      model: folder of an EditReward.
      batch_size: edits judged at a time, on all devices together; one program serves all batches.
      combine: 'geometric' or 'mean' of the targets, or the name of one of them.
      precision: what the vision-language model is kept and computed in: the run's, or another by name.
      mesh: what it computes on; None: all devices.

    Raises:
      ValueError, FileNotFoundError: at construction, see `EditRewardModel.load`.
    """

    on_mesh = True

    def __init__(
        self,
        model: str = "",
        batch_size: int = 32,
        combine: str = "geometric",
        precision: Precision | str = PRECISIONS["float32"],
        mesh: Mesh | None = None,
    ):
        if not model:
            raise ValueError(
                "no EditReward is named; give its folder as `model`, launch.train makes one from configs/edit_reward.py."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more.")
        self.folder, self.batch_size, self.combine, self.mesh = str(model), batch_size, combine, mesh
        self.precision = as_precision(precision)
        self.targets = EditRewardModel.check(model).targets
        check_combine(combine, self.targets)
        self._model: EditRewardModel | None = None
        self._loading = threading.Lock()

    def _loaded(self) -> tuple[EditRewardModel, Mesh]:
        with self._loading:
            if self._model is None:
                self.mesh = self.mesh or make_mesh()
                key = (self.folder, self.mesh, self.precision)
                self._model = _LOADED.get(key) or EditRewardModel.load(*key, scoring=True)
                _LOADED[key] = self._model
            return self._model, cast(Mesh, self.mesh)

    def check(self, records: Sequence[PromptRecord]) -> None:
        if missing := [record.prompt for record in records if record.image is None]:
            raise ValueError(
                f"EditReward judges edits, and {missing[0]!r} comes without a picture to edit; use another reward."
            )

    def prepare(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Questions:
        """Raises a ValueError for a record without a source picture."""
        self.check(records)
        model, mesh = self._loaded()
        asked = [record.image for record in records], images, [record.prompt for record in records]
        return model.questions(*asked, self.batch_size, mesh)

    def score_prepared(self, prepared: Questions) -> Scores:
        """Scores edits; see `EditRewardModel.judge` about several processes."""
        model, mesh = self._loaded()
        scores = model.judge(prepared, self.batch_size, mesh)
        details = {name: scores[:, column] for column, name in enumerate(self.targets)}
        return Scores(combine(scores, self.combine, self.targets), details)

    def score(self, images: Sequence[np.ndarray], records: Sequence[PromptRecord]) -> Scores:
        return self.score_prepared(self.prepare(images, records))
