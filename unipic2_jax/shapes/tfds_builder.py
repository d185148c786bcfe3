"""The shapes world as a data set of tensorflow-datasets, written and read without TensorFlow.

    ShapesWorld(config="edit", data_dir=DIR).download_and_prepare()
    tfds.data_source("shapes_world/edit", split="train", data_dir=DIR)

Importing this file makes the data set known to tensorflow-datasets.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from unipic2_jax.shapes.edits import random_edit
from unipic2_jax.shapes.pool import edit_example, prompt_example
from unipic2_jax.shapes.prompts import random_prompt
from unipic2_jax.shapes.sources import TASKS
from unipic2_jax.shapes.world import IMAGE_SIZE, Scene, render


@dataclasses.dataclass(eq=False)
class ShapesConfig(tfds.core.BuilderConfig):
    """A data set of the shapes world.

    Attributes:
      task: 't2i' or 'edit'.
      train: examples of the training split; the first of `shapes.sources.ShapesExamples` with this seed, in their order.
      heldout: examples of combinations that no training example shows.
    """

    task: str = "t2i"
    train: int = 10_000
    heldout: int = 500
    seed: int = 0


class ShapesWorld(tfds.core.GeneratorBasedBuilder):
    """Captions ('image', 'caption') and edits ('input_image', 'instruction', 'output_image') of flat shapes, 48 x 48 pixels."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        ShapesConfig(name="t2i", description="Scenes with captions."),
        ShapesConfig(name="edit", task="edit", description="Edits of scenes with their instructions."),
    ]

    def __init__(self, **kwargs: Any):
        # The only format that can be written without TensorFlow and read at random.
        super().__init__(**{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png")
        text = tfds.features.Text()
        features = {
            "t2i": {"image": image, "caption": text},
            "edit": {"input_image": image, "instruction": text, "output_image": image},
        }[self.builder_config.task]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures of flat shapes whose truth can be checked exactly.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        sizes = {"train": self.builder_config.train, "heldout": self.builder_config.heldout}
        return {split: self._generate_examples(split, count) for split, count in sizes.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index in range(count):
            kind = TASKS[config.task][index % len(TASKS[config.task])]
            rng = np.random.default_rng([config.seed, index])
            if config.task == "t2i":
                drawn = random_prompt(rng, kind, split) if split == "heldout" else prompt_example(config.seed, index)
                yield index, {"image": _png(drawn.scene), "caption": drawn.prompt}
            else:
                edit = random_edit(rng, kind, split) if split == "heldout" else edit_example(config.seed, index)
                pictures = {"input_image": _png(edit.source), "output_image": _png(edit.target)}
                yield index, {"instruction": edit.prompt, **pictures}


def _png(scene: Scene) -> bytes:
    """Encoded here, because tensorflow-datasets encodes arrays with TensorFlow."""
    data = io.BytesIO()
    Image.fromarray(render(scene)).save(data, "PNG")
    return data.getvalue()
