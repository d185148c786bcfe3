"""The shapes world is a plug-in: without its folder the library imports, finds everything else, and makes and loads a model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unipic2_jax

PACKAGE = Path(unipic2_jax.__file__).parent
SCRIPT = Path(__file__).parents[1] / "support" / "without_shapes.py"


@pytest.fixture(scope="module")
def without_shapes(tmp_path_factory):
    """A folder with a copy of the package that lacks the shapes world."""
    folder = tmp_path_factory.mktemp("without_shapes")
    leave_out = shutil.ignore_patterns("shapes", "assets", "__pycache__")
    copy = shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=leave_out)
    (copy / "assets").symlink_to(PACKAGE / "assets")
    assert (copy / "rewards").is_dir() and not (copy / "shapes").exists()
    return folder


def registered(files):
    """The names that files register, where they write them out."""
    return {name for file in files for name in re.findall(r'\.register\("(\w+)"\)', file.read_text())}


def test_the_library_needs_no_shapes_world(without_shapes, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(without_shapes), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "model")]
    ended = subprocess.run(command, cwd=without_shapes, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    left = json.loads(ended.stdout)
    assert {"reward", "model size", "prompt source", "network", "kind of stage"} <= {
        what for what in left if left[what]
    }
    names = {name for found in left.values() for name in found}
    brought = registered((PACKAGE / "shapes").rglob("*.py"))
    assert {"tiny", "shapes", "shapes_t2i", "shapes_edit"} <= brought and not brought & names
    missing = registered((without_shapes / PACKAGE.name).rglob("*.py")) - names
    assert not missing
