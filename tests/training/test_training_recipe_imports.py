"""Reading what a recipe trains must not cost what training costs: the import of a recipe is plain Python."""

import pkgutil
import subprocess
import sys

import configs

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "transformers", "tensorflow")
IMPORT_EACH = f"""
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module("configs." + name)
    if loaded := [heavy for heavy in {HEAVY} if heavy in sys.modules]:
        sys.exit(f"configs/{{name}}.py imports {{', '.join(loaded)}}")
"""


def test_importing_a_recipe_loads_no_jax():
    recipes = [module.name for module in pkgutil.iter_modules(configs.__path__)]
    assert {"pdtr", "unipic2", "tiny", "finetune"} <= set(recipes)
    ended = subprocess.run([sys.executable, "-c", IMPORT_EACH, *recipes], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
