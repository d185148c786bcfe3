"""Writes prompts for reinforcement in GenEval's format; none says what one of the 553 official ones says.

    python -m launch.geneval_prompts --counts=position=700,counting=150,color_attr=300,colors=100,two_object=100 --out=prompts.jsonl
    python -m launch.geneval_prompts --counts=position=50,two_object=50 --exclude=prompts.jsonl --seed=1 --out=heldout.jsonl

Prompts count as the same when they say the same in another order, or place the same two objects along the same axis.
"""

from __future__ import annotations

from absl import flags

from launch import cli

OUT = flags.DEFINE_string("out", None, "JSONL file to write.")
COUNTS = flags.DEFINE_list("counts", None, "Prompts of each tag: position=700,counting=150.")
SEED = flags.DEFINE_integer("seed", 0, "Of the choice and the order.", lower_bound=0)
EXCLUDE = flags.DEFINE_multi_string("exclude", [], "Further prompt files whose prompts must not come; may be repeated.")
ALLOW_OFFICIAL = flags.DEFINE_list(
    "allow_official", [], "Tags whose official prompts may come, for models that GenEval will not measure."
)
flags.mark_flags_as_required(["out", "counts"])


def main(argv: list[str]) -> None:
    del argv
    from unipic2_jax.rewards.geneval.prompts import generate, read_digests, write_prompts

    exclude = frozenset().union(*map(read_digests, EXCLUDE.value))
    counts = read_counts(COUNTS.value)
    rows = generate(counts, SEED.value, exclude, ALLOW_OFFICIAL.value)
    write_prompts(OUT.value, rows)
    print(f"{OUT.value}: {len(rows)} prompts (" + ", ".join(f"{tag} {count}" for tag, count in counts.items()) + ")")


def read_counts(parts: list[str]) -> dict[str, int]:
    """The flag --counts as {tag: number}."""
    counts = {}
    for part in parts:
        tag, _, number = part.partition("=")
        if not number.isdecimal() or tag in counts:
            raise ValueError(f"--counts has '{part}'; write each tag once with a number, as position=700,counting=150.")
        counts[tag] = int(number)
    return counts


if __name__ == "__main__":
    cli.run(main, compiles=False)
