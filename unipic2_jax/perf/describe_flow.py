"""How a stage of flow matching is planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from unipic2_jax.data.buckets import MULTIPLE
from unipic2_jax.data.examples import make_examples
from unipic2_jax.perf.described import DESCRIPTIONS, Description
from unipic2_jax.training.stage import Stage


class FlowDescription(Description):
    """Black pictures instead of the data."""

    def without_content(self, stage: ConfigDict, all_shapes: bool) -> None:
        pixels = {pixels for _, pixels in stage.resolutions}
        if 0 in pixels:  # the data's own
            pixels |= {make_examples(stage.data, 0, stage.tasks[0]).resolution}
        blank = {"resolution": max(pixels), "multiple": math.gcd(MULTIPLE, *pixels), "all_aspects": all_shapes}
        stage.data = ConfigDict({"kind": "blank", **blank})
        stage.validation.data = ConfigDict()
        stage.loader_threads = 0
        if not all_shapes:
            stage.resolutions = ((0.0, stage.resolutions[-1][1]),)

    def part_of_batch(self, name: str, stage: ConfigDict, shards: int, log: Callable[[str], None]) -> None:
        del name, log
        stage.batch_size //= shards

    def parameters(self, made: Stage) -> Any:
        """What such a stage trains lives on in its state alone."""
        return made.frozen


DESCRIPTIONS.register("flow")(FlowDescription())
