"""What a run is made of before its first step: its folder, devices, model and caches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.model import MODELS, Model, Start
from unipic2_jax.parallel.compat import keep_programs
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.parallel.processes import is_main
from unipic2_jax.training import config as config_lib
from unipic2_jax.weights.precision import PRECISIONS


def tell(sentence: str) -> None:
    """Before there is a progress bar; of several processes one speaks."""
    if is_main():
        print(sentence, file=sys.stderr, flush=True)


def config_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """All devices, in the shape that `config.parallel` asks for."""
    try:
        return make_mesh(None, *config_lib.mesh_fields(config.parallel))
    except ValueError as error:
        raise config_lib.ConfigError(f"config.parallel: {error}") from error


def settled(config: ConfigDict, plan: Callable[[ConfigDict, Callable[[str], None]], ConfigDict] | None) -> ConfigDict:
    """The configuration with nothing 'auto' in it: on accelerators as `plan` finds it, elsewhere `config_lib.unplanned`.

    Raises:
      ConfigError: when several accelerators are to share the work and there is nothing to choose how.
    """
    devices, splits = jax.devices(), config.parallel.preset == config_lib.AUTO
    if devices[0].platform == "cpu" or not (splits or config_lib.left_to_plan(config)):
        return config_lib.unplanned(config)
    if plan is None:
        if splits and len(devices) > 1:
            raise config_lib.ConfigError(
                "config.parallel.preset is 'auto', which nothing was given to choose with; pass split=perf.split.resolved, or name a preset."
            )
        return config_lib.unplanned(config)
    return plan(config, tell)


def load_model(config: ConfigDict, mesh: jax.sharding.Mesh) -> Model:
    """The model that a run starts from, of the kind that `config.model` names.

    Raises:
      ValueError, FileNotFoundError: one sentence about what does not fit.
    """
    fields = {name: _plain(config[name]) for name in ("seed", "attention", *config_lib.MODEL_FIELDS)}
    return MODELS.get(config.model, Bundle).start(Start(**fields), mesh, PRECISIONS[config.precision])


def save_model(model: Model, folder: Path, changed: Collection[str], config: ConfigDict) -> None:
    """Writes a run's model in its own layout: in float32, or in the dtypes of the files that it came from, with a copy of what is
    not `changed`, as the policy of `config.precision` wants it.
    """
    # A vision-language model that came from a folder of its own stays there.
    with_vlm = config_lib.model_config(config, config.stages[config.schedule[-1]].model).vlm is None
    if PRECISIONS[config.precision].as_files:
        model.save(folder, None, changed, with_vlm)
    else:
        model.save(folder, "float32", with_vlm=with_vlm)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value


def use_compilation_cache(workdir: str | os.PathLike) -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR, else beside the runs, so that a second start is quick."""
    keep_programs(Path(workdir).absolute().parent / ".cache" / "jax", 0.3)
