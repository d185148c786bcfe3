"""JSON objects that describe dataclasses: every value has the type that its field is annotated with."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from unipic2_jax.core.strict import as_number, excerpt

_PLAIN = {
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a finite number", lambda value: as_number(value) is not None),
    str: ("a text", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    type(None): ("null", lambda value: value is None),
}
_SEVERAL = {"a whole number": "whole numbers", "a finite number": "finite numbers", "a text": "texts"}


def hints(cls: type, names: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Annotations of a dataclass's fields, or of these."""
    return _hints(cls, None if names is None else tuple(names))


@functools.cache
def _hints(cls: type, names: tuple[str, ...] | None) -> Mapping[str, Any]:
    annotations = typing.get_type_hints(cls)
    return {name: annotations[name] for name in (names or [field.name for field in dataclasses.fields(cls)])}


def check_fields(wanted: Mapping[str, Any], values: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError, with a sentence about the first of `values` that is not of the type that `wanted` has for it.

    Args:
      wanted: name -> annotation: int, float, str, bool, None, tuple[..., ...], Mapping, a dataclass, or a union of these.
        Names that only `values` have are left alone.
      where: what the name is written behind ('vision_config.').
    """
    for name, hint in wanted.items():
        if name in values and not _fits(values[name], hint):
            raise ValueError(
                f"the field '{where}{name}' is {excerpt(repr(values[name]), 60)}, and it must be {_described(hint)}."
            )


def _fits(value: Any, hint: Any) -> bool:
    if hint in _PLAIN:
        return _PLAIN[hint][1](value)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(one, typing.get_args(hint)[0]) for one in value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return isinstance(value, (Mapping, hint))
    return isinstance(value, origin or hint)


def _described(hint: Any) -> str:
    if hint in _PLAIN:
        return _PLAIN[hint][0]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, typing.get_args(hint)))
    if origin is tuple:
        return f"a list of {_SEVERAL[_described(typing.get_args(hint)[0])]}"
    return "an object"
