"""CPU seconds that a host spends on a step's samples: what takes longer than the devices' step is what a run waits for.

    python -m benchmarks.host_costs

Measured is the process's CPU time (all threads) of one process for `--samples` pictures of `--size` pixels, with nothing on the devices:
how pictures come off them, what every reward does on the host, and what every conditioner makes of the prompts of both branches of
guidance. Tokenizers have a small vocabulary and the models no weights, so that nothing is downloaded. Rewards whose work is a network on
the host are measured on `--few` pictures, and what cannot run is said with its reason. Printed is a Markdown table; where there is a
bound, the exit code is 1 when it is exceeded (only at the size for which it is one).
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from PIL import Image

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.models.bundle import make_modules
from unipic2_jax.models.conditioner import Conditioner, tokenize_negative
from unipic2_jax.models.edit_reward.model import EditRewardModel, Spec, to_bucket
from unipic2_jax.models.edit_reward.network import EditReward
from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.models.registry import SIZES, family_of
from unipic2_jax.rewards.base import REWARDS, make_reward
from unipic2_jax.rewards.remote.reward import write_request
from unipic2_jax.shapes.pool import WORDS
from unipic2_jax.shapes.sources import ShapesSource
from unipic2_jax.shapes.vlm_processor import build_vlm_processor, vocabulary

STANDARD = (256, 512)  # samples and size for which the bounds are
BOUNDS = {"pictures": 0.5, "editreward": 4.0, "unipic2_metaquery": 3.0}
INSTRUCTION = "make the mug on the left red, and leave everything else in the picture as it is"


class Row(NamedTuple):
    """What one thing costs; `reason` says why it was not measured."""

    what: str
    seconds: float | None
    per: str = ""
    reason: str = ""


def photographs(count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth random pictures, uint8 [size, size, 3]."""
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(count)]
    return [np.asarray(picture.resize((size, size))) for picture in coarse]


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Of a second call, when programs are compiled and tables are made."""
    work()
    started = time.process_time()
    work()
    return time.process_time() - started


def records(samples: int, size: int, group: int) -> list[PromptRecord]:
    """Edits, the samples of a group with the same source."""
    sources = photographs(-(-samples // group), size, 1)
    asked = [PromptRecord(f"{INSTRUCTION}, number {i}", source) for i, source in enumerate(sources)]
    return [asked[i // group] for i in range(samples)]


def pictures(samples: int, size: int) -> float:
    """Off the devices: uint8, and a list of pictures."""
    drawn = jnp.asarray(np.stack(photographs(samples, size)))
    return cpu_seconds(lambda: list(np.array(drawn)))


def vlm_processor(config: Qwen2_5_VLConfig) -> Any:
    """A processor with this model's pictures and a small tokenizer in its format, and the configuration that fits it."""
    tokens, _ = vocabulary(WORDS)
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{field}_token_id": tokens[f"<|{name}|>"] for field, name in names.items()}
    fitting = dataclasses.replace(config, vocab_size=len(tokens), **ids)
    return fitting, build_vlm_processor(WORDS, fitting, 512 * 512)


def edit_reward(samples: int, size: int, group: int) -> float:
    """Questions about edits, in the reward's batches, and their padding."""
    sizes, processor = vlm_processor(SIZES["unipic2_metaquery"].networks["vlm"])
    model = EditRewardModel(EditReward(sizes), {}, processor, Spec())
    asked, edited = records(samples, size, group), photographs(samples, size)
    texts = [record.prompt for record in asked]

    def work() -> None:
        for batch in model.questions([record.image for record in asked], edited, texts).batches:
            to_bucket(batch)

    return cpu_seconds(work)


def conditioner(name: str) -> Conditioner | str:
    """The conditioner of the sizes of this name, without weights; or why there is none."""
    sizes = SIZES[name]
    configs = dict(sizes.networks)
    family = family_of(configs)
    if family.reader:
        configs[family.reader], tokenizers = vlm_processor(configs[family.reader])
    elif sizes.tokenizers is not None:
        tokenizers = sizes.tokenizers(configs)
    else:
        return "its tokenizers have to be downloaded"
    return make_modules(configs, tokenizers, sizes.settings, "float32")[2]


def tokens(made: Conditioner, texts: list[str], size: int) -> float:
    """As many prompts as there are texts, each with a picture of its own where the conditioner reads any, and those of the other branch."""
    shown = [[picture] for picture in photographs(len(texts), size)]

    def work() -> None:
        made.tokenize(texts, shown if made.reads_images else None)
        tokenize_negative(made, None, shown)

    return cpu_seconds(work)


def asks(kind: str, samples: int, size: int, group: int) -> float:
    """What a reward that asks a server does on this side of the network."""
    options = {
        "judge": {"base_url": "http://localhost:1", "model": "none", "api_key_env": ""},
        "remote": {"url": "http://localhost:1"},
    }
    reward: Any = make_reward(kind, **options[kind])
    asked, edited = records(samples, size, group), photographs(samples, size)
    part = reward.calls.batch_size
    write = (lambda images, rows: reward.question(images, rows[0])) if kind == "judge" else write_request
    ask = lambda start: json.dumps(write(edited[start : start + part], asked[start : start + part])).encode()
    return cpu_seconds(lambda: [ask(start) for start in range(0, samples, part)])


def in_the_shapes_world(kind: str, samples: int) -> float:
    """The verifier on pictures of its own size."""
    task = kind.removeprefix("shapes_")
    asked = ShapesSource(0, task).batch(0, samples)
    images = [record.image for record in ShapesSource(1, "edit").batch(0, samples)]
    reward = make_reward(kind)
    return cpu_seconds(lambda: reward.score(images, asked))


def reward_row(kind: str, samples: int, size: int, group: int, few: int) -> Row:
    """What a registered reward costs."""
    per = f"{samples} x {size}"
    if kind == "editreward":
        return Row(kind, edit_reward(samples, size, group), per)
    if kind in ("judge", "remote"):
        return Row(kind, asks(kind, samples, size, group), per)
    if kind.startswith("shapes_"):
        return Row(kind, in_the_shapes_world(kind, samples), f"{samples} of the shapes world")
    if kind == "geneval":
        return Row(kind, None, reason="its detector's weights have to be downloaded; they are on a GPU, or a server's")
    if kind == "ocr":
        try:
            reward = make_reward(kind)
        except ValueError as error:
            return Row(kind, None, reason=str(error))
        images, asked = photographs(few, size), [PromptRecord('a sign that says "hello"')] * few
        return Row(kind, cpu_seconds(lambda: reward.score(images, asked)) * samples / few, f"{few} x {size}, scaled")
    if kind == "blank":
        return Row(kind, None, reason="it is that of plans, and costs nothing")
    return Row(kind, None, reason="this benchmark does not know how to call it")


def rows(samples: int, size: int, group: int, few: int) -> Iterator[Row]:
    """Everything, one after the other."""
    yield Row("pictures", pictures(samples, size), f"{samples} x {size}")
    for kind in sorted(REWARDS):
        yield reward_row(kind, samples, size, group, few)
    for name in sorted(SIZES):
        if isinstance(made := conditioner(name), str):
            yield Row(name, None, reason=made)
            continue
        texts = [f"{INSTRUCTION}, number {i}" for i in range(samples)]
        if name.startswith("tiny"):  # which has room for sentences of the shapes world only
            texts = [record.prompt for record in ShapesSource(0, "edit").batch(0, samples)]
        yield Row(name, tokens(made, texts, size), f"{samples} x {size}" if made.reads_images else f"{samples}")


def main(argv: list[str]) -> None:
    del argv
    samples, size, group, few = (flags.FLAGS[name].value for name in ("samples", "size", "group", "few"))
    exceeded = []
    print(f"{platform.machine()}, {platform.python_version()}, JAX {jax.__version__}\n")
    print("| what | CPU s | of | bound |\n|---|---:|---|---:|")
    for row in rows(samples, size, group, few):
        bound = BOUNDS.get(row.what) if (samples, size) == STANDARD else None
        cost = "-" if row.seconds is None else f"{row.seconds:.2f}"
        print(f"| {row.what} | {cost} | {row.per or row.reason} | {bound or ''} |", flush=True)
        if bound is not None and row.seconds is not None and row.seconds > bound:
            exceeded.append(row.what)
    if exceeded:
        sys.exit(f"Above its bound: {', '.join(exceeded)}.")


if __name__ == "__main__":
    flags.DEFINE_integer("samples", STANDARD[0], "Pictures of a step.", lower_bound=1)
    flags.DEFINE_integer("size", STANDARD[1], "Edge of the pictures in pixels.", lower_bound=32)
    flags.DEFINE_integer("group", 16, "Samples of a prompt, which share its source.", lower_bound=1)
    flags.DEFINE_integer("few", 8, "Pictures for rewards that run a network on the host.", lower_bound=1)
    app.run(main)
