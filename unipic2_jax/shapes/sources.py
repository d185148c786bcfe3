"""The shapes world as `data.prompts.PromptSource` for reinforcement and evaluation, as `data.examples.ExampleSource`, and as
`data.questions.QuestionSource`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unipic2_jax.data.examples import EXAMPLES, EndlessExamples, Example
from unipic2_jax.data.prompts import SOURCES, PromptRecord
from unipic2_jax.data.questions import QUESTIONS, Question
from unipic2_jax.rewards.geneval.rules import TAGS
from unipic2_jax.shapes.edits import EDIT_TYPES, ShapesEdit, random_edit
from unipic2_jax.shapes.pool import dense_scene, edit_example, prompt_example
from unipic2_jax.shapes.prompts import ShapesPrompt, random_prompt
from unipic2_jax.shapes.questions import ALL_TAGS, MAX_THINGS, QUESTION_TAGS, random_question
from unipic2_jax.shapes.world import IMAGE_SIZE, Scene, Thing, render

TASKS = {"t2i": TAGS, "edit": EDIT_TYPES}
# Pixels of a token of the tiny models, which edges of scaled pictures are multiples of.
EDGE_MULTIPLE = 16


def scene_to_dict(scene: Scene) -> dict[str, Any]:
    """Plain JSON values."""
    return dataclasses.asdict(scene)


def scene_from_dict(values: Mapping[str, Any]) -> Scene:
    """The inverse of `scene_to_dict`."""
    return Scene(values["background"], tuple(Thing(**thing) for thing in values["things"]))


@SOURCES.register("shapes")
class ShapesSource:
    """Endless prompts or edits; a batch goes through the tags (edit types) in turn, so that each counts the same.

    Attributes:
      task: 't2i' or 'edit'.
      split: 'train', or 'heldout' for combinations that no training example shows.
      tags: the turn, when it is not once through all tags; a tag may come several times.
    """

    def __init__(self, seed: int = 0, task: str = "t2i", split: str = "train", tags: Sequence[str] = ()):
        if task not in TASKS:
            raise ValueError(f"The shapes source has no task '{task}'; use one of {', '.join(TASKS)}.")
        if unknown := set(tags) - set(TASKS[task]):
            raise ValueError(f"The task '{task}' has no tag '{unknown.pop()}'; use some of {', '.join(TASKS[task])}.")
        self.seed, self.task, self.split, self.tags = seed, task, split, tuple(tags) or TASKS[task]

    def batch(self, step: int, count: int) -> list[PromptRecord]:
        """Records step * count ... of the endless sequence."""
        return [self._record(index) for index in range(step * count, (step + 1) * count)]

    def _record(self, index: int) -> PromptRecord:
        rng = np.random.default_rng([self.seed, list(TASKS).index(self.task), self.split == "heldout", index])
        kind = self.tags[index % len(self.tags)]
        if self.task == "t2i":
            drawn: ShapesPrompt | ShapesEdit = random_prompt(rng, kind, self.split)
            return PromptRecord(drawn.prompt, None, drawn.metadata)
        drawn = random_edit(rng, kind, self.split)
        metadata = {"tag": kind, **drawn.metadata, "source": scene_to_dict(drawn.source)}
        return PromptRecord(drawn.prompt, render(drawn.source), metadata)


@EXAMPLES.register("shapes")
class ShapesExamples(EndlessExamples):
    """Training examples: 't2i' and 'edit' from the training split, 'image' crowded scenes for the autoencoder.

    Attributes:
      weights: how often a tag or edit type is drawn, relative to 1 for those that are not named.
    """

    def __init__(self, seed: int = 0, task: str = "t2i", weights: Mapping[str, float] | None = None):
        super().__init__(task, IMAGE_SIZE, EDGE_MULTIPLE)
        self.seed, self.task, self.weights = seed, task, dict(weights or {})
        if unknown := self.weights.keys() - {*TAGS, *EDIT_TYPES}:
            raise ValueError(f"The shapes data has no tag or edit type '{unknown.pop()}'; correct its weights.")

    def example(self, index: int) -> Example:
        if self.task == "t2i":
            drawn = prompt_example(self.seed, index, self.weights)
            return Example(render(drawn.scene), drawn.prompt)
        if self.task == "edit":
            edit = edit_example(self.seed, index, self.weights)
            return Example(render(edit.target), edit.prompt, (render(edit.source),))
        return Example(render(dense_scene(self.seed, index)))


@QUESTIONS.register("shapes")
class ShapesQuestions:
    """Questions about scenes and prompts, one kind after the other.

    Attributes:
      split: 'train', or 'heldout' for scenes and prompts with a combination that none in training has.
      most: objects in a scene.
      tags: the turn, when it is not once through `QUESTION_TAGS`; a kind may come several times.
    """

    def __init__(self, seed: int = 0, split: str = "train", most: int = MAX_THINGS, tags: Sequence[str] = ()):
        if not 1 <= most <= MAX_THINGS:
            raise ValueError(f"Scenes of at most {most} objects are not in the shapes world; give 1 to {MAX_THINGS}.")
        if unknown := set(tags) - set(ALL_TAGS):
            raise ValueError(f"'{min(unknown)}' is not a kind of question; use some of {', '.join(ALL_TAGS)}.")
        self.seed, self.split, self.most, self.tags = seed, split, most, tuple(tags) or QUESTION_TAGS

    def question(self, index: int) -> Question:
        """Question number `index`."""
        rng = np.random.default_rng([self.seed, self.split == "heldout", index])
        drawn = random_question(rng, self.tags[index % len(self.tags)], self.split, self.most)
        image = None if drawn.scene is None else render(drawn.scene)
        return Question(image, drawn.question, drawn.answer, drawn.tag)
