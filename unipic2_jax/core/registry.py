"""Names in configurations, and what they stand for: `@REWARDS.register("ocr")` above a class is all that it takes.

A module of the library that registers something is found by itself, and so is a package that is installed with an entry point of
the group `unipic2_jax`. Nothing else has to name it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from unipic2_jax.core.errors import nearest

T = TypeVar("T")

PACKAGE = Path(__file__).parents[1]
# How a module says that it registers something.
_REGISTERS = re.compile(r"^@?[A-Z_]+\.(register|adopt)\(", re.MULTILINE)
_discovered = False


def discover() -> None:
    """Imports every module of the library that registers something, and the installed packages that name themselves its plug-ins."""
    global _discovered
    if _discovered:
        return
    _discovered = True  # first: what is imported here may look something up itself
    for file in sorted(PACKAGE.rglob("*.py")):
        if _REGISTERS.search(file.read_text(encoding="utf-8")):
            importlib.import_module(".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)))
    for plugin in entry_points(group=PACKAGE.name):
        plugin.load()


class Registry(MutableMapping[str, Any]):
    """Name -> what was registered under it, most often a class.

    Attributes:
      what: it holds, for messages: 'prompt source'.
    """

    def __init__(self, what: str):
        self.what = what
        self._entries: dict[str, Any] = {}
        self._adopted: list[tuple[Registry, Callable[[str], Any]]] = []

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers what it decorates."""

        def keep(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return keep

    def adopt(self, other: Registry, make: Callable[[str], Any]) -> None:
        """Every name of another registry is one of this too, and stands for what `make` makes of the name."""
        self._adopted.append((other, make))

    def find(self, name: Any) -> Any:
        """What stands under a name.

        Raises:
          ValueError: when there is nothing.
        """
        if name not in self:
            raise ValueError(f"The {self.what} {name!r} does not exist{nearest(str(name), self, 'choose one of')}")
        return self[name]

    def make(self, config: Mapping[str, Any], **given: Any) -> Any:
        """The object that `config` describes: its `kind`, and options of that kind, which overrule those `given`.

        Raises:
          ValueError: for an unknown kind or option.
        """
        options = dict(config)
        kind = options.pop("kind", None)
        maker = self.find(kind)
        try:
            return maker(**{**given, **options})
        except TypeError as error:
            raise ValueError(
                f"The {self.what} '{kind}' does not take these options ({error}); correct them."
            ) from error

    def __getitem__(self, name: str) -> Any:
        discover()
        if name not in self._entries:
            for other, make in self._adopted:
                if name in other:
                    return make(name)
        return self._entries[name]

    def __setitem__(self, name: str, entry: Any) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        discover()
        return iter(dict.fromkeys([*self._entries, *(name for other, _ in self._adopted for name in other)]))

    def __len__(self) -> int:
        return len(list(iter(self)))
