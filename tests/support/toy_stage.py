"""A stage small enough to be killed often: least squares with Adam, and two parameter groups."""

import ctypes
import dataclasses
import functools
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from unipic2_jax.core.registry import discover
from unipic2_jax.optim.optimizer import make_optimizer, merge_params, split_params
from unipic2_jax.training import loop, signals
from unipic2_jax.training.compiling import BackgroundCompiler
from unipic2_jax.training.config import make_config
from unipic2_jax.training.metrics import read_evaluations, read_rows
from unipic2_jax.training.stage import STAGES, Stage, stage_fields


@dataclasses.dataclass(frozen=True)
class ToyBundle:
    params: dict

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def hang(workdir):
    """Never ends and, like a long compilation, lets no other bytecode of this thread run; says that it is here."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    (workdir / "hanging").touch()
    library.pthread_mutex_lock(mutex)


def compile_long(number, x):
    """As a compilation, this cannot be interrupted."""
    time.sleep(COMPILE)
    return x + number


class ToyStage(Stage):
    ahead = None

    @classmethod
    def default_config(cls):
        config = stage_fields()
        config.nan_at = -1
        config.weights = {}
        config.ballast = 1  # numbers in the state that mean nothing, so that a checkpoint is large
        return config

    def init(self):
        self.optimizer = make_optimizer(self.config.optimizer, self.config.steps)
        trained, _ = split_params(self.bundle.params["transformer"], self.config.optimizer.trainable)
        ballast = jax.random.normal(jax.random.key(0), (self.config.ballast,))
        opt = self.optimizer.init(trained)
        return {"trained": trained, "opt": opt, "seen": jnp.zeros((), jnp.int32), "ballast": ballast}

    @functools.cached_property
    def _update(self):
        @jax.jit
        def update(state, key):
            x = jax.random.normal(key, (8, 4))

            def loss(trained):
                y = x @ trained["dense"]["kernel"] + trained["dense"]["bias"]
                return jnp.mean((y - jnp.sin(x) * (1 + self.context.index)) ** 2)

            value, grads = jax.value_and_grad(loss)(state["trained"])
            updates, opt = self.optimizer.update(grads, state["opt"], state["trained"])
            trained = optax.apply_updates(state["trained"], updates)
            return {**state, "trained": trained, "opt": opt, "seen": state["seen"] + 8}, value

        return update

    def step(self, state, step):
        if step == TROUBLE.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == TROUBLE.get("error_at"):
            raise ZeroDivisionError
        if step == TROUBLE.get("term_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if step == TROUBLE.get("hang_at"):
            hang(self.context.workdir)
        if step == TROUBLE.get("compile_at"):
            self.ahead = BackgroundCompiler(self.context.mesh, self.context.log)
            for number in range(3):
                self.ahead.ask(
                    number, "what is never used", jax.jit(functools.partial(compile_long, number)), jnp.ones(())
                )
        if step == TROUBLE.get("full_at"):
            # No file can become larger than this, as on a disk without room.
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        state, loss = self._update(state, self.context.key(step))
        loss = float("nan") if step == self.config.nan_at else loss
        return state, {"loss": loss, "seen": state["seen"]}

    def evaluate(self, state, step):
        if step == TROUBLE.get("hang_in_evaluation"):
            hang(self.context.workdir)
        score = np.asarray(state["trained"]["dense"]["kernel"]).sum(axis=1)
        image = Image.fromarray(np.full((8, 8, 3), step % 256, np.uint8))
        return {"metrics": {"score": score.mean()}, "scores": {"kernel": score}, "images": {"grid": image}}

    def finish(self, state):
        _, frozen = split_params(self.bundle.params["transformer"], self.config.optimizer.trainable)
        params = {**self.bundle.params, "transformer": merge_params(state["trained"], frozen)}
        return self.bundle.replace(params=params)

    def close(self):
        if self.ahead:
            self.ahead.close()

    def export(self, state, folder):
        (folder / "toy.json").write_text(json.dumps({"seen": int(state["seen"])}))


STAGES["toy"] = ToyStage
discover()  # once, in the process that all others are forked from
# A step may take longer than a run gives it after a signal, on a loaded machine, and be that of the tests' own process.
signals.GRACE = 600.0
COMPILE = 60.0  # seconds
# What the process does to itself; no part of the configuration, which must be the same when the run continues.
TROUBLE = {}


def toy_config(seed=0, **fields):
    """Two stages; `fields` go to both."""
    optimizer = {"lr": 0.05, "trainable": "dense"}
    stage = {"kind": "toy", "steps": 12, "save_every": 3, "eval_every": 5, "optimizer": optimizer, **fields}
    second = {**stage, "steps": 7, "optimizer": {**optimizer, "schedule": "cosine"}}
    return make_config({"seed": seed, "schedule": ("first", "second"), "stages": {"first": stage, "second": second}})


def load(config, mesh):
    del mesh
    key = jax.random.key(config.seed)
    dense = {"kernel": jax.random.normal(key, (4, 4)), "bias": jnp.zeros(4)}
    return ToyBundle(
        {"transformer": {"dense": dense, "pos_embed": {"pos_embed": jnp.ones(3)}}, "vae": {"w": jnp.ones(2)}}
    )


def save(bundle, folder, changed, **options):
    del changed, options
    folder.mkdir(parents=True)
    flat = {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(bundle.params)}
    np.savez(folder / "params.npz", **flat)


def contents(workdir):
    """All of a run that must not depend on interruptions."""
    rows = read_rows(workdir / "metrics.jsonl")
    with np.load(workdir / "export" / "params.npz") as arrays:
        params = {name: arrays[name].tobytes() for name in arrays.files}
    newest = max(int(path.name) for path in (workdir / "checkpoints/states").iterdir())
    record = json.loads((workdir / f"checkpoints/states/{newest}/record/metadata").read_text())
    return {
        "rows": [{k: v for k, v in row.items() if k not in ("seconds_step", "seconds_timeline")} for row in rows],
        "evaluations": read_evaluations(workdir),
        "export": params,
        "state": record["checksums"],
        "samples": sorted(p.name for p in (workdir / "samples").iterdir()),
    }


def run(workdir, own_process=False, **fields):
    return loop.run(toy_config(**fields), workdir, load=load, save=save, own_process=own_process)


def say_in(output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)


def command(flags, trouble, output):
    """`launch.train` with a recipe of toys; its flags are not those of the tests' own process."""
    from absl import app

    from launch import train

    TROUBLE.update(trouble)
    say_in(output)
    loop.load_model, loop.save_model = load, save
    sys.argv = ["train", *flags]
    app.run(train.main, flags_parser=train.parse_flags)


def child(workdir, fields, trouble, output=None, asynchronous=False, grace=None):
    """The same in a process of its own, with what it says in a file."""
    TROUBLE.update(trouble)
    if output is not None:
        say_in(output)
    signals.GRACE = grace or signals.GRACE
    verify = loop.Checkpoints._damaged

    def read(self, step):
        if step == TROUBLE.get("term_at"):
            time.sleep(TROUBLE.get("read_for", 0))
        return verify(self, step)

    loop.Checkpoints._damaged = read
    loop.Checkpoints = functools.partial(loop.Checkpoints, asynchronous=asynchronous)
    run(workdir if "://" in workdir else Path(workdir), own_process=True, **fields)
