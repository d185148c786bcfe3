"""From a configuration to an optax transformation, and the split of parameters into trained and frozen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError, nearest


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by update: a linear warm-up from 0, then constant, cosine down to `end_lr` at `steps`, or
    trapezoid: constant, then straight down to `end_lr` over the last `decay` of the steps."""
    if config.warmup >= steps and config.warmup > 0:
        raise ConfigError(f"optimizer.warmup is {config.warmup} steps of {steps}; it must be less.")
    after = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(
            config.lr, steps - config.warmup, config.end_lr / config.lr if config.lr else 0.0
        ),
        "trapezoid": optax.join_schedules(
            [
                optax.constant_schedule(config.lr),
                optax.linear_schedule(config.lr, config.end_lr, max(1, int(steps * config.decay))),
            ],
            [steps - config.warmup - max(1, int(steps * config.decay))],
        ),
    }
    if config.schedule not in after:
        raise ConfigError(f"optimizer.schedule '{config.schedule}' does not exist" + nearest(config.schedule, after))
    if not config.warmup:
        return after[config.schedule]
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.lr, config.warmup), after[config.schedule]], [config.warmup]
    )


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam or AdamW as in PyTorch (decay on every trained leaf, scaled by the rate).

    `steps` counts updates; with several updates per step of the loop pass their product.
    """
    rate = make_schedule(config, steps)
    b1, b2 = config.betas
    makers = {
        "adamw": lambda: optax.adamw(rate, b1, b2, config.eps, weight_decay=config.weight_decay),
        "adam": lambda: optax.adam(rate, b1, b2, config.eps),
    }
    if config.name not in makers:
        raise ConfigError(f"optimizer.name '{config.name}' does not exist" + nearest(config.name, makers))
    update = optax.chain(makers[config.name](), scale_by_rules(config.lr_scales))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


def scale_by_rules(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Updates times the factor of the first rule (regex on 'path/to/leaf', factor) that finds a match; others stay.

    Behind an optimizer that is a learning rate of their own for these leaves, weight decay included.

    Raises:
      ConfigError: for a rule that is not a pair, or whose regex is none.
    """
    try:
        compiled = [(re.compile(pattern), float(factor)) for pattern, factor in rules]
    except (TypeError, ValueError, re.error) as error:
        raise ConfigError(f"optimizer.lr_scales must hold pairs of a regex and a factor ({error}).") from error

    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        factor = next((factor for pattern, factor in compiled if pattern.search(name)), None)
        return update if factor is None else update * factor

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates))


def check_rules(rules: Sequence[tuple[str, float]], trained: dict[str, Any]) -> None:
    """Says which rule of `scale_by_rules` finds no match in the leaves that are trained.

    Raises:
      ConfigError: for the first such rule.
    """
    names = list(traverse_util.flatten_dict(trained, sep="/"))
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in names):
            some = ", ".join(sorted(names)[:3])
            raise ConfigError(
                f"optimizer.lr_scales '{pattern}' matches nothing that is trained; the names look like {some}."
            )


def split_params(params: dict[str, Any], trainable: str, never: str = "(?!)") -> tuple[dict[str, Any], dict[str, Any]]:
    """Two nested dicts: the leaves whose 'path/to/leaf' the regex finds a match in, and the others.

    Gradients and optimizer state are made for the first alone, so frozen leaves cost neither.

    Args:
      never: a regex of leaves that are not trained whatever `trainable` says; by default there are none.

    Raises:
      ConfigError: when nothing would be trained.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {path for path in flat if re.search(trainable, path) and not re.search(never, path)}
    if not chosen:
        some = ", ".join(sorted(flat)[:3])
        raise ConfigError(f"optimizer.trainable '{trainable}' matches no parameter; the names look like {some}.")
    halves = ({p: v for p, v in flat.items() if (p in chosen) == side} for side in (True, False))
    return tuple(traverse_util.unflatten_dict(half, sep="/") for half in halves)


def merge_params(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_params`."""
    flat = traverse_util.flatten_dict(frozen, sep="/") | traverse_util.flatten_dict(trainable, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")


def optimizer_fields() -> ConfigDict:
    """AdamW with the paper's betas, epsilon and weight decay."""
    return ConfigDict(
        {
            "name": "adamw",  # adamw | adam
            "lr": 1e-4,
            "schedule": "constant",  # constant | cosine | trapezoid, after a linear warm-up
            "warmup": 0,  # steps
            "end_lr": 0.0,  # what cosine and trapezoid end at
            "decay": 0.2,  # last part of a trapezoid, in which the rate falls
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.05,
            "clip_norm": 1.0,  # 0: no clipping
            "trainable": ".*",  # a regex on 'path/to/leaf'; what it does not match stays frozen
            "lr_scales": (),  # ((regex, factor), ...): of the learning rate; the first that matches a trained leaf counts
        }
    )
