"""What a run is made of before its first step: its folder, devices, model and caches."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.parallel.processes import is_main
from unipic2_jax.training import config as config_lib
from unipic2_jax.weights.precision import PRECISIONS, Precision

EDIT_REWARD = "edit_reward"  # what config.model says when no picture is drawn but edits are scored


def check_writable(workdir: Path) -> None:
    """Makes the folder of a run, before anything is computed.

    Raises:
      ConfigError: when nothing can be written there, or it is the address of a bucket.
    """
    if re.match(r"\w{2,}:/", str(workdir)):  # Path makes one slash of two
        raise config_lib.ConfigError(
            f"The workdir {workdir} is an address and not a folder; mount it, and give the path as --workdir."
        )
    probe = workdir / f".writable{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise config_lib.ConfigError(
            f"The workdir {workdir} cannot be written ({error.strerror}); repair it or choose another --workdir."
        ) from error


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


def with_copies(config: ConfigDict) -> ConfigDict:
    """The configuration with whole copies of the parameters in place of `parallel.preset='auto'`."""
    if config.parallel.preset != config_lib.AUTO:
        return config
    with (changed := config.copy_and_resolve_references()).unlocked():
        changed.parallel.preset = "ddp"
    return changed.lock()


def shared(config: ConfigDict, split: Callable[[ConfigDict, Callable[[str], None]], ConfigDict] | None) -> ConfigDict:
    """The configuration with a split in place of `parallel.preset='auto'`: of several accelerators the one that `split` finds.

    Raises:
      ConfigError: when there is nothing to choose it.
    """
    devices = jax.devices()
    if config.parallel.preset != config_lib.AUTO or devices[0].platform == "cpu" or len(devices) == 1:
        return with_copies(config)
    if split is None:
        raise config_lib.ConfigError(
            "config.parallel.preset is 'auto', which nothing was given to choose with; pass split=perf.split.resolved, or name a preset."
        )
    return split(config, tell)


def load_bundle(config: ConfigDict, mesh: jax.sharding.Mesh) -> Any:
    """The model a run starts from: the folder `config.init`, or random weights of the size `config.model`."""
    from unipic2_jax.models import bundle

    precision = PRECISIONS[config.precision]
    if config.model == EDIT_REWARD:
        from unipic2_jax.models.edit_reward.model import EditRewardModel

        return EditRewardModel.start(config.init, config.vlm, config.settings.to_dict(), mesh, precision)
    if config.init is not None:
        found = bundle.load_bundle(config.init, precision, mesh, config.vlm)
    else:
        options = {"parts": config.parts.to_dict(), "zero_projectors": config.zero_projectors}
        found = bundle.init_bundle(config.model, config.seed, mesh=mesh, dtype=precision, **options)
    settings, known = config.settings.to_dict(), found.conditioner.SETTINGS
    if unknown := [name for name in settings if name not in known]:
        raise config_lib.ConfigError(
            f"config.settings.{unknown[0]} is no setting of this model's conditioner"
            + config_lib.nearest(unknown[0], known)
        )
    return found.replace(
        transformer=found.transformer.clone(attention_implementation=config.attention),
        conditioner=dataclasses.replace(found.conditioner, **settings),
    )


def save_bundle(
    bundle: Any,
    folder: Path,
    changed: Collection[str],
    *,
    with_vlm: bool = True,
    precision: Precision = PRECISIONS["float32"],
) -> None:
    """Writes a bundle in diffusers layout, or an EditReward in its own: in float32, or in the dtypes of the files that it came
    from, with a copy of what is not `changed`, as the policy wants it.
    """
    from unipic2_jax.models import bundle as bundle_lib

    if not isinstance(bundle, bundle_lib.Bundle):
        bundle.save(folder, changed=changed if precision.as_files else None)
    elif precision.as_files:
        bundle_lib.save_bundle(bundle, folder, None, with_vlm, changed)
    else:
        bundle_lib.save_bundle(bundle, folder, with_vlm=with_vlm)


def use_compilation_cache(workdir: str | os.PathLike) -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR, else beside the runs, so that a second start is quick."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(workdir).absolute().parent / ".cache" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
