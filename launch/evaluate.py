"""Scores a model.

python -m launch.evaluate --suite=shapes [--model=DIR] [--reconstruct] [--gates] [--baseline=JSON] [--out=DIR]    # draws and edits
python -m launch.evaluate --suite=shapes-vqa --model=DIR [--gates] [--out=DIR]                  # understands
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from launch import cli
from unipic2_jax.core.assets import TINY

_SUITE = flags.DEFINE_enum("suite", "shapes", ["shapes", "shapes-vqa"], "What to measure.")
_MODEL = flags.DEFINE_string("model", str(TINY), "Folder of the model in diffusers layout, or a hub id.")
_LORA = cli.lora_flag()
_OUT = flags.DEFINE_string("out", None, "Folder that receives scores.json, and contact sheets or answers.jsonl.")
_RECONSTRUCT = flags.DEFINE_bool("reconstruct", False, "Measure the autoencoder alone: which scenes stay readable.")
_GATES = flags.DEFINE_bool("gates", False, "Exit with 1 unless the scores lie where a checkpoint for RL must lie.")
_BASELINE = flags.DEFINE_string(
    "baseline", None, "scores.json of another model (from its --out): the gates are then to be no worse."
)
_QUESTIONS = flags.DEFINE_integer("questions", 600, "Held-out questions of shapes-vqa.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 200, "Held-out prompts per task.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 4, "Pictures per prompt.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Sampling steps.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", 1.0, "Guidance scale; 1 switches guidance off.")


def main(argv: list[str]) -> None:
    """Prints the scores, and the gates that they miss."""
    del argv
    missed = _score_answers() if _SUITE.value == "shapes-vqa" else _score_pictures()
    if _GATES.value:
        print("\n".join(["", *missed]) if missed else "\nall gates passed")
        sys.exit(1 if missed else 0)


def _score_answers() -> list[str]:
    if _LORA.value:
        raise ValueError(
            "--suite=shapes-vqa asks the vision-language model, which no LoRA of the transformer changes; leave --lora out."
        )
    from unipic2_jax.data.questions import make_questions
    from unipic2_jax.evaluation import vqa
    from unipic2_jax.pipelines.chat import ChatModel

    source = make_questions({"kind": "shapes", "split": "heldout"}, vqa.HELD_OUT_SEED)
    questions = [source.question(index) for index in range(_QUESTIONS.value)]
    answers = vqa.answer_questions(ChatModel.load(_MODEL.value), questions)
    _, shares = vqa.score_answers(questions, answers)
    print(f"shapes-vqa: {len(questions)} held-out questions, exact answers")
    for tag, share in shares.items():
        print(f"{tag:16}{share:10.3f}")
    if _OUT.value:
        out = Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / "scores.json").write_text(json.dumps(shares, indent=2) + "\n")
        with (out / "answers.jsonl").open("w") as f:
            for q, answer in zip(questions, answers, strict=True):
                f.write(json.dumps({"tag": q.tag, "question": q.question, "right": q.answer, "answer": answer}) + "\n")
    low = vqa.ACCURACY_GATE
    return [] if shares["overall"] >= low else [f"Exact answers are {shares['overall']:.3f}, below {low}."]


def _score_pictures() -> list[str]:
    from unipic2_jax.models.bundle import load_bundle
    from unipic2_jax.pipelines import adapters
    from unipic2_jax.shapes import benchmark as shapes

    baseline = _read_baseline()
    loras = adapters.located(_LORA.value)
    bundle, _ = adapters.load_fused(load_bundle(_MODEL.value), loras)
    missed: list[str] = []
    if _RECONSTRUCT.value:
        found = shapes.readability(bundle)
        print(f"held-out scenes              {found.scenes}")
        print(f"read back from clean renders {found.clean:.3f}")
        print(
            f"read back after the VAE      {found.decoded:.3f}   (objects {found.objects:.4f}, PSNR {found.psnr:.1f} dB)"
        )
        if found.clean < 1:
            missed.append(f"The verifier reads {found.clean:.3f} of clean renders, not all.")
        if found.decoded < shapes.READABLE_GATE:
            missed.append(f"The VAE keeps {found.decoded:.3f} of scenes readable, fewer than {shapes.READABLE_GATE}.")
    else:
        missed = _score_tasks(bundle, baseline)
    return missed


def _read_baseline() -> dict | None:
    if _BASELINE.value is None:
        return None
    try:
        scores = json.loads(Path(_BASELINE.value).read_text())
        return {task: dict(scores[task]) for task in ("t2i", "edit")}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_BASELINE.value} holds no scores of both tasks; give the scores.json that --out of another model wrote."
        ) from error


def _score_tasks(bundle, baseline: dict | None) -> list[str]:
    from configs.shapes import evaluations
    from unipic2_jax.evaluation.evaluator import Evaluator, read_evaluation
    from unipic2_jax.parallel.mesh import make_mesh
    from unipic2_jax.shapes import benchmark as shapes

    out = Path(_OUT.value) if _OUT.value else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    missed, table = [], {}
    configs = evaluations(_PROMPTS.value, _SAMPLES.value, _STEPS.value, _GUIDANCE.value)
    for task, fields in configs.items():
        result = Evaluator(task, read_evaluation(task, fields), bundle, make_mesh()).run(bundle.params)
        table[task] = result["metrics"]
        strict = shapes.summarize(task, result["metrics"], "correct")
        gated = strict if task == "t2i" else shapes.summarize(task, result["metrics"], "instruction")
        print(f"\n{task}: {_PROMPTS.value} held-out prompts x {_SAMPLES.value} samples")
        print(f"{'':16}{'correct':>10}" + (f"{'instruction':>13}" if task == "edit" else ""))
        for tag, value in strict.items():
            print(f"{tag:16}{value:10.3f}" + (f"{gated[tag]:13.3f}" if task == "edit" else ""))
        if baseline is None:
            missed += shapes.failed_gates(gated, "GenEval-shapes" if task == "t2i" else "Instruction success")
        elif strict["overall"] < (other := shapes.summarize(task, baseline[task], "correct")["overall"]):
            missed.append(f"{task} is {strict['overall']:.3f}, below the baseline's {other:.3f}.")
        if out:
            for name, picture in result["images"].items():
                picture.save(out / f"{name}.png")
    if out:
        (out / "scores.json").write_text(json.dumps(table, indent=2) + "\n")
    return missed


if __name__ == "__main__":
    cli.run(main)
