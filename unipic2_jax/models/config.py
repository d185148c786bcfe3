"""What every network's configuration can do: be read from and written to the `config.json` of diffusers / transformers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from unipic2_jax.core.fields import check_fields, hints
from unipic2_jax.core.strict import read_object

FILE_NAME = "config.json"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of the frozen size dataclasses. Field names are those of the original's `config.json`.

    `CLASS_NAME` is what the original writes as `_class_name` (diffusers) or `architectures` (transformers), `MODEL_TYPE` what
    transformers writes as `model_type`.
    """

    CLASS_NAME = ""
    MODEL_TYPE = ""
    # Fields of files that `adapted` reads besides the class's own, with their types.
    FOREIGN: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Self:
        """Reads `folder/config.json`.

        Raises:
          FileNotFoundError: there is none.
          ValueError: a sentence that names the file, for what `from_dict` refuses.
        """
        file = Path(folder) / FILE_NAME
        values = read_object(file)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Reads the fields that this network has and leaves the others (training switches of the original) alone.

        Args:
          where: what the names of fields are written behind in messages ('vision_config.').

        Raises:
          ValueError: for a field that is missing or of another type, and for what this network does not support.
        """
        wanted = hints(cls)
        check_fields({**wanted, **cls.FOREIGN}, values, where)
        values = cls.adapted(values)
        check_fields(wanted, values, where)
        kept: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in wanted
        }
        for name, hint in wanted.items():
            if isinstance(hint, type) and issubclass(hint, ModelConfig) and isinstance(kept.get(name), Mapping):
                kept[name] = hint.from_dict(kept[name], f"{where}{name}.")
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.name not in kept and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"The {cls.CLASS_NAME} config lacks {', '.join(missing)}; add it to its config.json.")
        return cls(**kept)

    @classmethod
    def adapted(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a file says, under the names of this class's fields; raises ValueError for what is not supported."""
        return values

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
