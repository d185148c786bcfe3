"""A flow run of the toy model over prepared files, which may kill itself; a module of its own so that processes can import it."""

import os
import signal

import toy_grpo

from unipic2_jax.training import loop
from unipic2_jax.training.config import make_config
from unipic2_jax.training.stages.flow import FlowStage

RESOLUTION, MULTIPLE = 4, 2  # a square picture has 4 x 4 pixels, one of 16:9 has 6 x 4; at half of it both have 2 x 2


def fields(folder, **changes):
    """A flow stage on prepared files."""
    values = {
        "kind": "flow",
        "steps": 12,
        "save_every": 3,
        "data": {"kind": "prepared", "path": str(folder)},
        "tasks": ("t2i", "t2i", "edit"),
        "batch_size": 8,
        "loader_threads": 2,
        "optimizer": {"lr": 3e-3, "trainable": "^(transformer|conditioner)/", "weight_decay": 0.0},
    }
    return {**values, **changes}


def run(workdir, folder):
    """A stage at two resolutions and one after it."""
    stages = {
        "grow": fields(
            folder, resolutions=((0.0, 2), (0.5, 4)), latents="sample", caption_dropout={"t2i": 0.5, "edit": 0.5}
        ),
        "more": fields(folder, steps=4, accumulation=2),
    }
    config = make_config({"schedule": tuple(stages), "stages": stages})
    return loop.run(config, workdir, load=toy_grpo.load, save=toy_grpo.save)


def child(workdir, folder, kill_at):
    """`run`, killed before step number `kill_at` of a stage."""
    step = FlowStage.step

    def killing(self, state, number):
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, state, number)

    FlowStage.step = killing
    run(workdir, folder)
