"""Questions about pictures.

    python -m launch.chat --model=DIR --image=a.png --prompt="how many circles are there?"
    python -m launch.chat --model=DIR --images=a.png --images=b.png --prompt="what changed?"
    python -m launch.chat --model=DIR --image=a.png --prompt="where is the red circle? answer in JSON" --json
    python -m launch.chat --model=DIR --image=a.png            # a conversation: one question a line, an empty line ends it

`--model` is a Qwen2.5-VL folder or hub id, or a MetaQuery model's folder, whose `vlm/` is taken. `--json` prints
{"answer": ..., "boxes": [{"label": ..., "box": [left, top, right, bottom]}]} in pixels of the picture.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from absl import flags

from launch import cli

MODEL = flags.DEFINE_string("model", None, "Qwen2.5-VL folder or hub id, or the folder of a MetaQuery model.")
IMAGE = flags.DEFINE_multi_string("image", [], "Picture to talk about; may be given several times.")
flags.DEFINE_alias("images", "image")
PROMPT = flags.DEFINE_string("prompt", None, "The question; without one, questions are read line by line.")
JSON = flags.DEFINE_bool("json", False, "Print the answer and the boxes in it as JSON; needs one --image and --prompt.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token each time.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens of this total probability.")
REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: what was said becomes less likely.")
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
DTYPE = cli.dtype_flag()
flags.mark_flag_as_required("model")


def main(argv: list[str]) -> None:
    del argv
    from unipic2_jax.models.qwen.generation import SamplingConfig
    from unipic2_jax.models.qwen.processor import user_message
    from unipic2_jax.pictures.decode import read_image
    from unipic2_jax.pipelines.chat import ChatModel

    if JSON.value and (PROMPT.value is None or len(IMAGE.value) != 1):
        raise ValueError("--json answers one --prompt about one --image; give both.")
    pictures = [read_image(path) for path in IMAGE.value]
    options = {
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "sampling": SamplingConfig(TEMPERATURE.value, TOP_P.value, REPETITION_PENALTY.value),
        "seed": SEED.value,
    }
    model = ChatModel.load(MODEL.value, DTYPE.value)
    print(f"{MODEL.value}: {model.description}", file=sys.stderr)
    conversation: list[dict] = []

    def ask(question: str, on_text) -> str:
        conversation.append(user_message([] if conversation else pictures, question))
        answer = model([conversation], on_text=on_text, **options)[0]
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer

    def show(text: str) -> None:
        print(text, end="", flush=True)

    if JSON.value:
        answer = ask(PROMPT.value, None)
        boxes = [dataclasses.asdict(box) for box in model.boxes(answer, pictures[0])]
        print(json.dumps({"answer": answer, "boxes": boxes}))
        return
    questions = [PROMPT.value] if PROMPT.value is not None else iter(lambda: _read_line(), "")
    for question in questions:
        ask(question, show)
        print()


def _read_line() -> str:
    """The next question; '' ends the conversation."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().removeprefix("\ufeff").strip()  # a file that is piped in may have a mark


if __name__ == "__main__":
    cli.run(main)
