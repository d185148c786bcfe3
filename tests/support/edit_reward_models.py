"""Small EditRewards with random weights, and pictures for them."""

import json

import jax
import numpy as np
from PIL import Image
from qwen_reference import SMALL, processor

from unipic2_jax.models.edit_reward import files
from unipic2_jax.models.edit_reward.model import EditRewardModel, Spec, with_lora
from unipic2_jax.models.qwen import names as qwen
from unipic2_jax.models.registry import NETWORKS
from unipic2_jax.weights import io, table

NETWORK = NETWORKS[SMALL.CLASS_NAME]
SPEC = Spec(("instruction", "quality"), template="{source}{edited}{instruction}")
RANK, ALPHA = 3, 7.5


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)) for _ in range(count)]


def draw(tree, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape) * max(x.shape[-2:]) ** -0.5).astype("f"), tree)


def make_model(folder, seed=0, targets=SPEC.targets):
    """A small EditReward on a vision-language model that is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    params = draw(NETWORK.abstract(SMALL), seed)
    io.write_folder(folder, io.TRANSFORMERS_STEM, table.to_torch(qwen.rules(SMALL), params))
    config = {"architectures": [SMALL.CLASS_NAME], "model_type": SMALL.MODEL_TYPE, **SMALL.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    processor(SMALL).save(folder)
    spec = Spec(targets, str(folder), SPEC.template)
    model = with_lora(EditRewardModel.create(spec), jax.random.key(seed), RANK, ALPHA)
    head = draw(files.abstract_head(SMALL, len(targets)), seed + 1)
    lora = draw(files.abstract_lora(SMALL, RANK), seed + 2)
    return EditRewardModel(model.module, {**model.params, "head": head, "lora": lora}, model.processor, spec)
