"""The networks, families and sizes that there are, and which of them a folder holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from unipic2_jax.core.errors import closest
from unipic2_jax.core.fields import check_fields
from unipic2_jax.core.registry import Registry
from unipic2_jax.core.strict import read_object
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.family import Backbone, Family, ModelSizes, Network

# Class name that diffusers and transformers write into config.json -> `Network`; name -> `Family`; name -> `ModelSizes`.
NETWORKS = Registry("network")
FAMILIES = Registry("family of models")
SIZES = Registry("model size")


def network_of(config: ModelConfig) -> Network:
    """The kind of network that a config is of."""
    return NETWORKS.find(config.CLASS_NAME)


def backbone_of(config: ModelConfig) -> Backbone:
    """The same of a transformer's config."""
    return cast(Backbone, network_of(config))


def find_sizes(name: str) -> ModelSizes:
    """The sizes of this name.

    Raises:
      ValueError: when there are none.
    """
    if name not in SIZES:
        raise ValueError(f"The model size {name!r} is unknown; choose one of {', '.join(sorted(SIZES))}.")
    return SIZES[name]


def family_of_folder(folder: Path) -> Family:
    """The family of a model folder."""
    (rest,) = (family for family in FAMILIES.values() if family.recognises is None)
    return next((family for family in FAMILIES.values() if family.recognises and family.recognises(folder)), rest)


def family_of(configs: Mapping[str, ModelConfig]) -> Family:
    """The family that has these networks, by folder.

    Raises:
      ValueError: when none has.
    """

    def fits(family: Family) -> bool:
        missing = set(family.networks) - set(configs) - set(family.optional)
        return not missing and all(family.networks.get(n) == config.CLASS_NAME for n, config in configs.items())

    for family in FAMILIES.values():
        if fits(family):
            return family
    raise ValueError(f"No family of models has the networks {', '.join(configs)}; it has {', '.join(FAMILIES)}.")


def class_name(folder: str | os.PathLike) -> str:
    """The class of the network in a folder, as its config.json states it ('' where it states none)."""
    file = Path(folder) / "config.json"
    values = read_object(file)
    try:
        check_fields({"_class_name": str | None, "architectures": tuple[str, ...] | None}, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return values.get("_class_name") or next(iter(values.get("architectures") or [""]))


def read_network(folder: str | os.PathLike) -> tuple[Network, ModelConfig]:
    """The network that a component's folder describes, with its sizes.

    Raises FileNotFoundError without a config.json, ValueError for a network that this project does not have, and for what
    `ModelConfig.read` refuses.
    """
    name = class_name(folder)
    if name not in NETWORKS:
        raise ValueError(
            f"{Path(folder) / 'config.json'} describes a network of class {name!r}{closest(name, NETWORKS)}, which is not known here; "
            f"known are {', '.join(NETWORKS)}."
        )
    network = NETWORKS[name]
    return network, network.config.read(folder)
