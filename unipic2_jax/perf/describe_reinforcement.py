"""How a stage of reinforcement is planned, and the reward that has a network on the same devices."""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from unipic2_jax.perf.described import DESCRIPTIONS, REWARD_PROGRAMS, Description
from unipic2_jax.perf.edit_reward_program import edit_reward_program
from unipic2_jax.rl.algorithm import ALGORITHMS, algorithm_fields, make_algorithm
from unipic2_jax.training.stages.reinforcement import tell_micro_batch


class ReinforcementDescription(Description):
    """One empty prompt, with a black picture for edits, and a reward that costs nothing."""

    def without_content(self, stage: ConfigDict, all_shapes: bool) -> None:
        del all_shapes
        stage.source = ConfigDict({"kind": "blank", "task": stage.source.get("task", "t2i")})
        stage.rewards = ConfigDict({"blank": {"weight": 1.0}})

    def part_of_batch(self, name: str, stage: ConfigDict, shards: int, log: Callable[[str], None]) -> None:
        fields = algorithm_fields(stage)
        stage.sampling_batches = make_algorithm(stage, shards).layout.batches  # as all chips together have them
        samples, parts = stage.num_prompts * fields.group_size, stage.sampling_batches * shards
        tell_micro_batch(name, stage, shards, log)
        if stage.num_prompts % parts:  # a group is on several chips, each of which has a prompt of it
            stage.num_prompts, fields.group_size = stage.sampling_batches, samples // parts
        else:
            stage.num_prompts //= shards
        fields.micro_batch = -(-fields.micro_batch // shards)

    def samples(self, stage: ConfigDict) -> tuple[int, int, int]:
        return stage.num_prompts * algorithm_fields(stage).group_size, stage.height, stage.width


DESCRIPTIONS.adopt(ALGORITHMS, lambda name: ReinforcementDescription())
REWARD_PROGRAMS.register("editreward")(edit_reward_program)
