"""Names in configurations, and what they stand for: `@REWARDS.register("ocr")` above a class is all that it takes.

A module of the library that registers something is found by itself, and so is a package that is installed with an entry point of
the group `unipic2_jax`. Nothing else has to name it.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from unipic2_jax.core.errors import nearest

T = TypeVar("T")

PACKAGE = Path(__file__).parents[1]
# How a module says that it registers something, and how a registry is made.
_REGISTERS = re.compile(r"^@?([A-Z_]+)\.(?:register|adopt)\(", re.MULTILINE)
_MAKES = re.compile(r'^([A-Z_]+) = Registry\("(.+)"\)', re.MULTILINE)
_discovered: set[str | None] = set()


@functools.cache
def _registering() -> tuple[dict[str, str], dict[str, list[str]]]:
    """What a registry holds -> the name of its variable, and such a name -> the modules that register something there."""
    variables: dict[str, str] = {}
    modules: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        variables |= {what: variable for variable, what in _MAKES.findall(text)}
        module = ".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts))
        for variable in dict.fromkeys(_REGISTERS.findall(text)):
            modules.setdefault(variable, []).append(module)
    return variables, modules


def discover(what: str | None = None) -> None:
    """Imports the modules of the library that register something in the registry of `what`, None: in any, and the installed packages
    that name themselves its plug-ins.

    Some of these modules bring libraries that take a second to import, and a picture needs no data readers.
    """
    if what in _discovered or None in _discovered:
        return
    first = not _discovered
    _discovered.add(what)  # first: what is imported here may look something up itself
    variables, modules = _registering()
    # A registry that is made elsewhere, as by a plug-in, may hold what any module says.
    wanted = modules.get(variables[what], []) if what in variables else [m for own in modules.values() for m in own]
    for module in sorted(set(wanted)):
        importlib.import_module(module)
    if first:
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
        discover(self.what)
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
        discover(self.what)
        return iter(dict.fromkeys([*self._entries, *(name for other, _ in self._adopted for name in other)]))

    def __len__(self) -> int:
        return len(list(iter(self)))
