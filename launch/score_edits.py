"""Makes EditReward's training data: edits by a model, marked by a judge.

    python -m launch.score_edits --model=DIR --source='{"kind": "jsonl", "path": "edits.jsonl", "task": "edit"}' \
        --judge='{"kind": "judge", "model": "gpt-4.1"}' --prompts=80000 --samples=4 --steps=10,28,50 --guidance=2,3.5,5 \
        --max_cost=900 --prompt_price=2 --completion_price=8 --out=runs/edit_reward
    python -m launch.score_edits --prompts=4000 --steps=1,2,3,6 --mismatched=0.3 --unedited=0.08 --out=runs/edit_reward

Without --model, --source and --judge it is the tiny model, the shapes world and its exact verifier. The same command goes on
where an interrupted one stopped, asks again about edits whose judgement failed, and stops asking when the money is spent.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli
from unipic2_jax.core.assets import TINY

MODEL = flags.DEFINE_string("model", str(TINY), "Model folder or hub id that makes the edits.")
LORA = cli.lora_flag()
SOURCE = flags.DEFINE_string(
    "source", '{"kind": "shapes", "task": "edit"}', "Of edits to make: JSON with its kind and options."
)
JUDGE = flags.DEFINE_string(
    "judge", '{"kind": "shapes_edit"}', "The reward that marks them: JSON with its kind and options."
)
OUT = flags.DEFINE_string("out", None, "Folder to write, or to go on with.")
PROMPTS = flags.DEFINE_integer("prompts", 1000, "Prompts of the source.", lower_bound=1)
SAMPLES = flags.DEFINE_integer("samples", 2, "Edits of each.", lower_bound=1)
STEPS = flags.DEFINE_list("steps", ["50"], "Sampling steps; each edit draws one of these.")
GUIDANCE = flags.DEFINE_list("guidance", ["3.5"], "Guidance scales; each edit draws one of these.")
MISMATCHED = flags.DEFINE_float("mismatched", 0.0, "Part of the edits that are made for another prompt's instruction.")
UNEDITED = flags.DEFINE_float("unedited", 0.0, "Part of the edits that are the source picture itself.")
HELDOUT = flags.DEFINE_float("heldout", 0.1, "Part of the source pictures whose edits go into OUT/heldout.")
SEED = flags.DEFINE_integer("seed", 0, "Of prompts, noise and draws.")
BATCH = flags.DEFINE_integer("batch", 32, "Prompts between two questions to the judge.", lower_bound=1)
AT_ONCE = flags.DEFINE_integer("at_once", 16, "Edits that are made at a time.", lower_bound=1)
MAX_CALLS = flags.DEFINE_integer("max_calls", None, "Edits that the judge is asked about, in all runs together.")
MAX_COST = flags.DEFINE_float("max_cost", None, "What the judge may cost in all runs together; needs the prices.")
PROMPT_PRICE = flags.DEFINE_float("prompt_price", 0.0, "Of a million tokens that the judge reads.")
COMPLETION_PRICE = flags.DEFINE_float("completion_price", 0.0, "Of a million tokens that it writes.")
FREE = ("prompts", "at_once", "heldout")
flags.mark_flag_as_required("out")


def main(argv: list[str]) -> None:
    """Prints what was made."""
    del argv
    from unipic2_jax import pipelines
    from unipic2_jax.data.prompts import look_through, make_source
    from unipic2_jax.pipelines.label_edits import Budget, EditLabels, Variety
    from unipic2_jax.rewards.scoring import CALL_FIELDS, Scorer, check_tasks, make_entries

    source, judge = _read_json("source", SOURCE.value), _read_json("judge", JUDGE.value)
    steps, guidance = _numbers("steps", STEPS.value, int), _numbers("guidance", GUIDANCE.value, float)
    shares = {"mismatched": MISMATCHED.value, "unedited": UNEDITED.value, "heldout": HELDOUT.value}
    variety = Variety(
        PROMPTS.value,
        SAMPLES.value,
        steps,
        guidance,
        **shares,
        seed=SEED.value,
        batch=BATCH.value,
        at_once=AT_ONCE.value,
    )
    budget = Budget(MAX_CALLS.value, MAX_COST.value, PROMPT_PRICE.value, COMPLETION_PRICE.value)
    prompts = make_source(source, SEED.value)
    entries = make_entries({"judge": judge})
    check_tasks(entries, prompts)
    scorer = Scorer(entries)
    # How much is done at a time, how many prompts there are and how they are split may change.
    judged = {name: value for name, value in judge.items() if name not in CALL_FIELDS}
    judged = entries["judge"].reward.deciding(judged)
    made = {name: value for name, value in dataclasses.asdict(variety).items() if name not in FREE}
    settings = {
        "model": MODEL.value,
        **({"lora": LORA.value} if LORA.value else {}),
        "source": source,
        "judge": judged,
        **made,
    }
    edits = EditLabels(OUT.value, settings)
    look_through(prompts, Path(OUT.value) / "looked_through.txt")
    counts = edits.run(pipelines.load(MODEL.value, loras=LORA.value), prompts, scorer, variety, budget)
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    if budget.cost is not None:
        print(f"cost {budget.price(edits.spent):.2f} of {budget.cost:.2f}")
    if counts["failed"] or counts["unasked"]:
        print("Some edits have no score; the same command asks again (with a larger budget where that was used up).")
        sys.exit(1)


def _read_json(flag: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{flag} is not JSON ({error}); write --{flag}='{{\"kind\": ...}}'.") from error
    if not isinstance(values, dict) or "kind" not in values:
        raise ValueError(f"--{flag} must be a JSON object with a kind; write --{flag}='{{\"kind\": ...}}'.")
    return values


def _numbers(flag: str, values: list[str], kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(value) for value in values)
    except ValueError as error:
        raise ValueError(f"--{flag} holds {','.join(values)!r}; write numbers with commas between them.") from error


if __name__ == "__main__":
    cli.run(main)
