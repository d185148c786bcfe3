"""What a run's configuration holds, and one-sentence answers to what it must not hold.

Recipes import this file, and importing a recipe loads no JAX: what needs it is imported where it is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from unipic2_jax.core.errors import ConfigError, nearest
from unipic2_jax.core.files import write_text
from unipic2_jax.flow.seeds import folded

# What stands for the fastest that fits, see perf.split: of a preset, and of a stage's `remat`.
AUTO = "auto"
# When frozen weights that are split are gathered.
GATHERS = ("update", "layer")
# What says which model is trained.
MODEL_FIELDS = ("init", "model", "parts", "vlm", "settings", "zero_projectors")


def base_config() -> ConfigDict:
    """The fields of every run. `schedule` is the order in which the named `stages` run."""
    return ConfigDict(
        {
            "seed": 0,
            # Folder of a model in diffusers layout, or None for random weights of the size called `model`.
            "init": config_dict.placeholder(str),
            "model": "tiny",
            # Without `init`: networks that are read, by name ('transformer', 'vae', 'vlm', ...) -> the folder of that network.
            "parts": {},
            # Of a MetaQuery model: where its Qwen2.5-VL is when not in `init`/vlm.
            "vlm": config_dict.placeholder(str),
            # Of the conditioner: fields that overrule the model's own (positions, max_sequence_length, reference_path ...).
            "settings": {},
            # Of a new connector: its projections onto the transformer start at zero, which then starts unconditioned.
            "zero_projectors": True,
            # Other models, by name, that stages can name as theirs: {'text': {'init': DIR}}; fields as the ones above.
            "models": {},
            "schedule": (),
            "stages": {},
            # What all networks are kept, trained and computed in: float32 | mixed, see `weights.precision`.
            "precision": "float32",
            # How many of the newest stay, and of which steps of the whole run all stay (multiples of it; 0: of none).
            "keep_checkpoints": 3,
            "keep_every": 0,
            # The kernel of the transformer's attention: auto | xla | cudnn | splash.
            "attention": "auto",
            # What XLA's compiler for GPUs is told beside its own defaults (`parallel.xla`): recipe | none. $XLA_FLAGS has the last word.
            "xla_flags": "recipe",
            # How the devices share the work: a preset of `parallel.mesh` or 'auto', the fastest one that fits (`perf.split`);
            # devices along single axes instead of its own; and when reinforcement gathers the transformer's frozen weights where
            # they are split: once an 'update' (and once a rollout), or 'layer' by layer in every pass, which takes less memory.
            "parallel": {
                "preset": "ddp",
                "data": 0,
                "fsdp": 0,
                "tensor": 0,
                "sequence": 0,
                "slices": 1,
                "gather": "update",
            },
        }
    )


def make_config(values: Mapping[str, Any]) -> ConfigDict:
    """A whole configuration: the defaults of the run and of every stage's kind, then `values` over them.

    Raises:
      ConfigError: for a field that does not exist or whose value has another type.
    """
    values = _plain(values)
    stages = {name: make_stage(fields, f"stages.{name}") for name, fields in values.pop("stages", {}).items()}
    config = _updated(base_config(), values, "")
    config.stages = ConfigDict(stages)
    return config


def make_stage(values: Mapping[str, Any], where: str = "stage") -> ConfigDict:
    """A stage's configuration: the defaults of its `kind`, then `values` over them."""
    from unipic2_jax.training.stage import stage_class

    values = _plain(values)
    if "kind" not in values:
        raise ConfigError(f"config.{where} names no kind; add kind='flow' or another.")
    defaults = stage_class(values["kind"]).default_config()
    return _updated(defaults, values, f"{where}.")


def validate(config: ConfigDict) -> ConfigDict:
    """Checks a configuration and returns it complete, with every default filled in, and locked.

    Raises:
      ConfigError: one sentence that names the field and its nearest match or remedy.
    """
    from unipic2_jax.parallel.mesh import PRESETS
    from unipic2_jax.parallel.xla import gpu_options
    from unipic2_jax.weights.precision import PRECISIONS

    config = make_config(config)
    _fold_seeds(config, "config")
    if config.precision not in PRECISIONS:
        raise ConfigError(f"config.precision is '{config.precision}'" + nearest(config.precision, PRECISIONS))
    gpu_options(config.xla_flags)
    if not config.schedule:
        raise ConfigError("config.schedule is empty; name at least one of the stages in it.")
    for name in config.schedule:
        if name not in config.stages:
            raise ConfigError(
                f"config.schedule names the stage '{name}', which config.stages does not have"
                + nearest(name, config.stages)
            )
    if len(set(config.schedule)) != len(config.schedule):
        raise ConfigError(
            "config.schedule names a stage twice; give the second run of it another name in config.stages."
        )
    for name, fields in config.models.items():
        if unknown := [field for field in fields if field not in MODEL_FIELDS]:
            raise ConfigError(f"config.models.{name} has no field '{unknown[0]}'" + nearest(unknown[0], MODEL_FIELDS))
    for name in config.schedule:
        stage = config.stages[name]
        if stage.model is not None and stage.model not in config.models:
            raise ConfigError(f"config.stages.{name}.model is '{stage.model}'" + nearest(stage.model, config.models))
        for field, least in {"steps": 1, "save_every": 1, "log_every": 1, "eval_every": 0}.items():
            if stage[field] < least:
                raise ConfigError(f"config.stages.{name}.{field} is {stage[field]}; it must be at least {least}.")
    if config.parallel.preset not in (AUTO, *PRESETS):
        known = nearest(config.parallel.preset, (AUTO, *PRESETS))
        raise ConfigError(f"config.parallel.preset is '{config.parallel.preset}'{known}")
    if config.parallel.gather not in GATHERS:
        raise ConfigError(f"config.parallel.gather is '{config.parallel.gather}'; use one of {', '.join(GATHERS)}.")
    if config.keep_checkpoints < 1:
        raise ConfigError(f"config.keep_checkpoints is {config.keep_checkpoints}; it must be at least 1.")
    if config.keep_every < 0:
        raise ConfigError(f"config.keep_every is {config.keep_every}; it must be at least 0.")
    return config.lock()


def left_to_plan(config: ConfigDict) -> list[str]:
    """Stages of the schedule whose `remat` is 'auto': the plan chooses it, and in how many parts a batch is computed where the recipe
    does not say (`micro_batch` or `accumulation` 0)."""
    return [name for name in config.schedule if config.stages[name].get("remat") == AUTO]


def unplanned(config: ConfigDict) -> ConfigDict:
    """The configuration where nothing can be planned: for 'auto' whole copies of the parameters, and what takes the least memory."""
    with (changed := config.copy_and_resolve_references()).unlocked():
        if changed.parallel.preset == AUTO:
            changed.parallel.preset = "ddp"
        for name in left_to_plan(config):
            stage = changed.stages[name]
            stage.remat = "full"
            if "accumulation" in stage:
                stage.accumulation = stage.accumulation or 1
    return changed.lock()


def _fold_seeds(node: ConfigDict, where: str) -> None:
    """Writes what every field called `seed` stands for."""
    for name, value in node.items():
        if isinstance(value, ConfigDict):
            _fold_seeds(value, f"{where}.{name}")
        elif name == "seed":
            try:
                node[name] = folded(value, f"{where}.{name}")
            except ValueError as error:
                raise ConfigError(str(error)) from error


def mesh_fields(parallel: ConfigDict) -> tuple[str, dict[str, int], int]:
    """Preset, devices along single axes, and slices of `config.parallel`, as `parallel.mesh` takes them."""
    from unipic2_jax.parallel.mesh import AXES

    return parallel.preset, {axis: parallel[axis] for axis in AXES}, parallel.slices


def model_config(config: ConfigDict, name: str | None) -> ConfigDict:
    """The configuration with the fields of `config.models[name]` instead of the run's own model; None changes nothing."""
    if name is None:
        return config
    values = {**{field: base_config()[field] for field in MODEL_FIELDS}, **config.models[name]}
    with (changed := config.copy_and_resolve_references()).unlocked():
        for field, value in values.items():
            changed[field] = value
    return changed


def unknown_override(config: ConfigDict, path: str) -> str | None:
    """The sentence about `--config.{path}` when the configuration has no such field, else None."""
    node: Any = config
    for depth, part in enumerate(path.split(".")):
        if not isinstance(node, ConfigDict):
            return None if part.isdigit() else f"config.{path} has no field '{part}': its parent is a plain value."
        if part not in node:
            parent = ".".join(["config", *path.split(".")[:depth]])
            return f"{parent} has no field '{part}'" + nearest(part, node.keys())
        node = node[part]
    return None


# What may differ between two commands that continue the same run: none of these changes its result by more than rounding.
FREE_FIELDS = (
    *("save_every", "log_every", "keep_checkpoints", "keep_every", "attention", "xla_flags"),
    *("remat", "micro_batch", "accumulation", "batch_branches", "sampling_batches"),
)
FREE_GROUPS = ("parallel",)


def check_same_run(config: ConfigDict, path: Path) -> list[str]:
    """Refuses to continue a run whose saved configuration at `path` is another one.

    A stage may get more steps while none after it has begun, and a stage that has not begun any number.

    Returns:
      A sentence about every stage whose steps are others than before.

    Raises:
      ConfigError: names the first differing field with both values.
    """
    if not path.exists():
        return []
    saved, asked = _flat(_with_new_fields(json.loads(path.read_text()))), _flat(json.loads(to_json(config)))
    steps = {f"stages.{name}.steps": name for name in config.schedule}
    told = []
    for name in sorted({*saved, *asked}):
        if name.rsplit(".", 1)[-1] in FREE_FIELDS or name.split(".", 1)[0] in FREE_GROUPS:
            continue
        old, new = (json.dumps(side[name]) if name in side else "absent" for side in (saved, asked))
        if old != new and name in steps and name in saved:
            told.append(_other_steps(config, path.parent, steps[name], saved[name]))
        elif old != new:
            raise ConfigError(
                f"{path.parent} holds a run with config.{name} = {old}, and this command asks for {new}; "
                "give the same value or another --workdir."
            )
    return told


def _with_new_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the fields that there were not when it was written: their defaults are what was done then."""
    try:
        return json.loads(to_json(make_config(saved)))
    except ConfigError:  # it has a field that there is no more, which is then the one that differs
        return saved


def _other_steps(config: ConfigDict, workdir: Path, name: str, old: int) -> str:
    """What it means that a stage of the run in `workdir` has other steps than the `old` ones.

    Raises:
      ConfigError: when the run cannot go on with them.
    """
    stage, index = config.stages[name], config.schedule.index(name)
    change = f"config.stages.{name}.steps = {stage.steps} instead of {old}"
    begun = [i for i in range(len(config.schedule)) if _has_begun(workdir, i)]
    if begun and begun[-1] > index:
        later = config.schedule[begun[-1]]
        raise ConfigError(
            f"{workdir} holds a run whose stage '{later}' has begun with what '{name}' gave, and this command asks for {change}; "
            f"give the {old} again, raise the steps of '{later}', or choose another --workdir."
        )
    if index in begun and stage.steps < old:
        raise ConfigError(
            f"{workdir} holds a run whose stage '{name}' has begun, and this command asks for {change}; give {old} or more, or "
            "another --workdir."
        )
    follows = [f"its learning rate follows '{stage.optimizer.schedule}'"] * (stage.optimizer.schedule != "constant")
    follows += ["its resolutions begin at parts"] * (len(stage.get("resolutions", ())) > 1)
    of_all = f"; {' and '.join(follows)} of the {stage.steps} from here on" if follows else ""
    return f"This command has {change}{of_all}."


def _has_begun(workdir: Path, index: int) -> bool:
    """Whether a stage has: it is evaluated before its first step, and takes over what the one before has trained."""
    evaluated = any((workdir / "evaluations").glob(f"{index}_*.json"))
    return evaluated or (index > 0 and (workdir / "checkpoints" / "params" / str(index)).exists())


def write_config(config: ConfigDict, path: Path) -> None:
    """Writes the resolved configuration as JSON, whole or not at all."""
    write_text(path, to_json(config))


def to_json(config: ConfigDict) -> str:
    """The configuration as JSON text with sorted names."""
    return json.dumps(_plain(config), indent=2, sort_keys=True) + "\n"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain dicts; a None that has a type in ConfigDict becomes a plain None."""
    values = values.to_dict() if isinstance(values, ConfigDict) else values
    return {k: _plain(v) if isinstance(v, (Mapping, ConfigDict)) else v for k, v in values.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _updated(defaults: ConfigDict, values: Mapping[str, Any], where: str) -> ConfigDict:
    """`values` over `defaults`. A default that is an empty ConfigDict takes any fields (weights of rewards, say)."""
    for key, value in values.items():
        if key not in defaults:
            raise ConfigError(
                f"config.{where}{key} is not a field of config{'.' + where[:-1] if where else ''}"
                + nearest(key, defaults.keys())
            )
        default = defaults.get(key)
        # A stage without a LoRA is one of rank 0: a ConfigDict's group of fields cannot be None.
        if value is None and key == "lora" and isinstance(default, ConfigDict):
            value = {"rank": 0}
        if isinstance(default, ConfigDict):
            if not isinstance(value, Mapping):
                raise ConfigError(f"config.{where}{key} is {value!r}, and it must be a dict of fields.")
            if len(default):
                _updated(default, value, f"{where}{key}.")
            else:
                defaults[key] = ConfigDict(value)
            continue
        try:
            defaults[key] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError):
            wanted = type(default).__name__
            raise ConfigError(f"config.{where}{key} is {value!r}, and it must be of type {wanted}.") from None
    return defaults
