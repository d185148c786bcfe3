"""What every network's configuration can do: be read from and written to the `config.json` of diffusers / transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of the frozen size dataclasses. Field names are those of the original's `config.json`.

    `CLASS_NAME` is what the original writes as `_class_name` (diffusers) or `architectures` (transformers).
    """

    CLASS_NAME = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads the fields that this network has and leaves the others (training switches of the original) alone."""
        names = {field.name for field in dataclasses.fields(cls)}
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.name not in kept and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"The {cls.CLASS_NAME} config lacks {', '.join(missing)}; add it to its config.json.")
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
