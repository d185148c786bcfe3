"""Sources are named in configurations by their kind; this makes them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def make_kind(table: Mapping[str, Any], what: str, config: Mapping[str, Any], **given: Any) -> Any:
    """The object that `config` describes: its `kind`, and options of that kind, which overrule those `given`.

    Args:
      table: kind -> class, or 'module:class', which is imported when it is first asked for.
      what: for messages, 'prompt source'.

    Raises:
      ValueError: for an unknown kind or option.
    """
    options = dict(config)
    kind = options.pop("kind", None)
    if kind not in table:
        raise ValueError(f"The {what} {kind!r} does not exist; choose one of {', '.join(sorted(table))}.")
    maker = table[kind]
    if isinstance(maker, str):
        module, name = maker.split(":")
        maker = getattr(importlib.import_module(module), name)
    try:
        return maker(**{**given, **options})
    except TypeError as error:
        raise ValueError(f"The {what} '{kind}' does not take these options ({error}); correct them.") from error
