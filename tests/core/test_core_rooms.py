"""What the import linter of `make lint` cannot see by itself (its order of the rooms is in pyproject.toml)."""

import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


def test_every_room_stands_in_the_linters_order():
    (order,) = (contract for contract in CONTRACTS["contracts"] if contract["id"] == "order")
    named = {room.strip() for line in order["layers"] for room in line.replace("|", ":").split(":")}
    inside = {f"unipic2_jax.{file.parent.name}" for file in (ROOT / "unipic2_jax").glob("*/*.py")}
    assert named == inside | {"launch", "convert", "configs"}


def test_no_file_imports_itself_through_others():
    """The linter compares what stands side by side; a folder's own `__init__.py` stands above its files."""
    grimp = pytest.importorskip("grimp", reason="the import linter is not installed")
    graph = grimp.build_graph(*CONTRACTS["root_packages"], cache_dir=None)
    assert len(graph.modules) > 200
    circle = []
    try:
        TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, " imports ".join(reversed(circle))
