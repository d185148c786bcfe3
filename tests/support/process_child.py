"""One process of a toy run, a flow stage and then PDTR, which may kill itself; started by test_parallel_processes.py.

python process_child.py WORKDIR DEVICES [WHO STAGE STEP SIGNAL]: process WHO sends itself the signal before this step, or fails (0).
The environment has TOY_PRESET, of parallelism, and TOY_ORDER: the devices along the mesh, '0,2,1,3', as a torus would mix them.
"""

import json
import os
import sys
import time

import jax
import numpy as np
import toy_grpo
from jax.experimental import mesh_utils

from unipic2_jax.data.examples import EXAMPLES, EndlessExamples, Example
from unipic2_jax.parallel import processes
from unipic2_jax.training import loop
from unipic2_jax.training.stage import stage_class
from unipic2_jax.training.stages.flow import FlowStage


class ToyExamples(EndlessExamples):
    """A letter a picture, as bright as its place in the alphabet."""

    def __init__(self, seed=0, task="t2i"):
        super().__init__(task, toy_grpo.SIZE, 1)
        self.seed, self.task = seed, task

    def example(self, index):
        letter = int(np.random.default_rng([self.seed, index]).integers(8))
        image = np.full((toy_grpo.SIZE, toy_grpo.SIZE, 3), 20 + 30 * letter, np.uint8)
        return Example(image, "abcdefgh"[letter] * 3, (255 - image,) if self.task == "edit" else ())


EXAMPLES["toy"] = ToyExamples
HEARTBEAT = 20  # seconds


def killing(stage, who, name, kill_step, number):
    """The step of a kind of stage that sends its own process a signal first, if it is process `who` in this stage."""
    step = stage.step

    def run(self, state, at):
        if (jax.process_index(), self.context.name, at) == (int(who), name, int(kill_step)):
            print(f"signal at {time.time()}", flush=True)
            if not int(number):
                raise ZeroDivisionError("of its own")
            os.kill(os.getpid(), int(number))
        return step(self, state, at)

    stage.step = run


def in_order(text):
    """Instead of `mesh_utils.create_device_mesh`, which on CPU has no torus to follow."""
    order = json.loads(f"[{text}]")
    return lambda shape, devices, **_: np.array(devices)[order].reshape(shape)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    processes.initialize(heartbeat=HEARTBEAT)
    if len(sys.argv) > 3:
        killing(FlowStage, *sys.argv[3:])
        killing(stage_class("grpo"), *sys.argv[3:])
    if "TOY_ORDER" in os.environ:
        mesh_utils.create_device_mesh = in_order(os.environ["TOY_ORDER"])
    flow = {
        "kind": "flow",
        "steps": 4,
        "save_every": 2,
        "data": {"kind": "toy"},
        "batch_size": 8,
        "loader_threads": 2,
        "validation": {"data": {"kind": "toy", "seed": 7}, "batches": 1},
        "optimizer": {"lr": 3e-3, "eps": 1e-3, "trainable": "^(transformer|conditioner)/"},
    }
    smooth = {"lr": 0.03, "eps": 0.1}  # Adam makes large differences of small ones where gradients are next to nothing
    edit = toy_grpo.stage(edit=True, steps=4, eval_every=2, optimizer=smooth, audit_every=2)
    t2i = toy_grpo.stage(steps=3, optimizer=smooth)
    with processes.ending(), processes.together():
        config = toy_grpo.config(flow=flow, edit=edit, t2i=t2i)
        config.parallel.preset = os.environ.get("TOY_PRESET", "ddp")
        loop.run(config, sys.argv[1], load=toy_grpo.load, save=toy_grpo.save, own_process=True)
