"""Draws, edits and answers where PyTorch and what stands on it cannot be imported; prints what of it was asked for all the same."""

import importlib.util
import sys

FORBIDDEN = ("torch", "torchvision", "diffusers", "peft", "accelerate")
asked = []


class Refuses:
    """Stands before all other finders."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            asked.append(name)
            raise ImportError(f"{name} is not there")
        return None


find_spec = importlib.util.find_spec


def looks(name, package=None):
    """A library may ask whether one is there, and is told that none is."""
    return None if name.partition(".")[0] in FORBIDDEN else find_spec(name, package)


importlib.util.find_spec = looks
sys.meta_path.insert(0, Refuses())
from launch import cli  # noqa: E402

shared = set(cli.flags.FLAGS)
for door in ("generate", "edit", "chat", "serve_vlm", "evaluate"):
    importlib.import_module(f"launch.{door}")
    for name in set(cli.flags.FLAGS) - shared:  # the next one has flags of the same names
        delattr(cli.flags.FLAGS, name)

from unipic2_jax import pipelines  # noqa: E402
from unipic2_jax.evaluation import benchmark  # noqa: E402, F401
from unipic2_jax.models.qwen.processor import user_message  # noqa: E402
from unipic2_jax.pipelines.chat import ChatModel  # noqa: E402
from unipic2_jax.serving import chat  # noqa: E402, F401

for model in (pipelines.TINY, pipelines.TINY_METAQUERY):
    pipe = pipelines.load(model)
    options = {"num_inference_steps": 1, "guidance_scale": 1}
    picture = pipe("a red circle", **options).images[0]
    pipe("make it green", image=picture, **options)
ChatModel.load(pipelines.TINY_METAQUERY)([[user_message([picture], "describe the image.")]], max_new_tokens=1)
print(sorted({*asked, *(name for name in FORBIDDEN if name in sys.modules)}))
