"""Text and images in, pictures or text out; it imports rewards and what is below them.

`pipe = load(folder)`, then `pipe("a red circle").images[0]`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh

from unipic2_jax.core.assets import TINY, TINY_EDIT_REWARD, TINY_METAQUERY
from unipic2_jax.models.bundle import Bundle, init_bundle, load_bundle, save_bundle
from unipic2_jax.pipelines import adapters
from unipic2_jax.pipelines.pipeline import Pipeline, PipelineOutput
from unipic2_jax.weights.precision import inference_dtype

__all__ = [
    "TINY",
    "TINY_EDIT_REWARD",
    "TINY_METAQUERY",
    "Bundle",
    "Pipeline",
    "PipelineOutput",
    "inference_dtype",
    "init_bundle",
    "load",
    "load_bundle",
    "save_bundle",
]


def load(
    source: str | os.PathLike = TINY,
    dtype: Any = None,
    mesh: Mesh | None = None,
    vlm: str | os.PathLike | None = None,
    loras: Iterable[str] = (),
    resident: str = "all",
) -> Pipeline:
    """The pipeline of a model folder or hub id; arguments and errors as `load_bundle`.

    Args:
      dtype: None: that of `inference_dtype`.
      loras: 'FILE_OR_FOLDER_OR_HUB_ID[:scale]', each; see `Pipeline.load_lora`.
      resident: which networks stay on the device between their uses, see `residence.RESIDENT`.
    """
    wanted = adapters.located(loras)
    pipe = Pipeline(load_bundle(source, inference_dtype(dtype), mesh, vlm), mesh, resident)
    for number, lora in enumerate(wanted):
        pipe.load_lora(lora.source, lora.scale, name=f"{number}: {lora.source}")
    return pipe
