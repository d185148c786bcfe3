"""EditReward's training data: edits by a model, marked by a judge (paper, section 3.2: 333k edits, GPT-4.1).

    OUT/settings.json       what is made, and who judges; a run with other settings is refused
    OUT/pictures/*.png      sources and edits
    OUT/made.jsonl          an edit a line: its number, key, prompt, pictures, metadata, and how it was made
    OUT/scores.jsonl        key, score and further marks of the edits that were judged
    OUT/spent.json          edits that the judge was asked about, and tokens
    OUT/scored.jsonl        the two lists as one, written at the end
    OUT/train/, heldout/    the same as ArrayRecord shards with the pictures inside, for stages of kind 'regression': no source
                            picture is in both

Everything is appended when a batch is done, so a run that is killed goes on where it was. An edit whose judgement failed has no
line in scores.jsonl: it is no edit of score 0, and the next run asks again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from unipic2_jax.core.files import append_rows, read_rows, to_text, write_text
from unipic2_jax.data.buckets import Bucket, nearest_aspect
from unipic2_jax.data.prepared import INDEX, PreparedExample, PreparedIndex, Shard, pack
from unipic2_jax.data.prompts import PromptRecord, PromptSource
from unipic2_jax.flow.seeds import folded
from unipic2_jax.pictures.decode import read_image
from unipic2_jax.pipelines.pipeline import Pipeline
from unipic2_jax.rewards.scoring import Scorer

SCORE = "score"  # the judge's own overall number, beside its further marks
SHARD_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class Variety:
    """How edits are made, so that there are bad ones among them.

    Attributes:
      prompts, samples: how many prompts, and edits of each.
      steps, guidance: of the sampler; each edit draws one of either.
      mismatched: part of the edits that are made for the instruction of another prompt.
      unedited: part that are the source picture itself.
      seed: of noise and draws.
      batch: prompts between two questions to the judge.
      at_once: edits that are made at a time.
      heldout: part of the source pictures whose edits are kept for measuring.
    """

    prompts: int
    samples: int = 2
    steps: tuple[int, ...] = (50,)
    guidance: tuple[float, ...] = (3.5,)
    mismatched: float = 0.0
    unedited: float = 0.0
    seed: int = 0
    batch: int = 32
    at_once: int = 16
    heldout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "batch", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more.")
        if not self.steps or min(self.steps) < 1 or not self.guidance:
            raise ValueError(
                f"steps {self.steps} and guidance {self.guidance} must name something; steps are 1 or more."
            )
        if min(self.mismatched, self.unedited) < 0 or self.mismatched + self.unedited > 1:
            raise ValueError(
                f"mismatched {self.mismatched} and unedited {self.unedited} must be parts of all edits; use 0 to 1 together."
            )
        if not 0 <= self.heldout <= 1:
            raise ValueError(f"heldout is {self.heldout}; use a part of the source pictures, 0 to 1.")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the judge may cost, over all runs in a folder together.

    Attributes:
      calls: edits that it is asked about, those that failed too; None: any number.
      cost: in the currency of the prices; None: any. The last batch may exceed it by what it costs more than those before.
      prompt_price, completion_price: of a million tokens.
    """

    calls: int | None = None
    cost: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        if self.cost is not None and not self.prompt_price + self.completion_price > 0:
            raise ValueError(
                "A largest cost needs the prices of a million tokens; give prompt_price and completion_price."
            )

    def price(self, spent: Mapping[str, int]) -> float:
        """The price of what was spent."""
        million = spent["prompt_tokens"] * self.prompt_price + spent["completion_tokens"] * self.completion_price
        return million / 1e6

    def allows(self, spent: Mapping[str, int]) -> int | None:
        """How many more edits the judge may be asked about, at the mean price so far; None: any number."""
        left = [] if self.calls is None else [self.calls - spent["calls"]]
        if self.cost is not None:
            rest, mean = self.cost - self.price(spent), self.price(spent) / max(spent["calls"], 1)
            if rest <= 0:
                left.append(0)
            elif mean:
                left.append(int(rest / mean))
        return max(0, min(left)) if left else None


class EditLabels:
    """The folder; `run` fills it."""

    def __init__(self, out: str | os.PathLike, settings: Mapping[str, Any]):
        """Begins a folder, or reads what is there.

        Raises:
          ValueError: it holds something else, or edits of other settings.
        """
        self.out = Path(out)
        self.made: dict[int, dict[str, Any]] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.spent = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
        settings, begun = json.loads(json.dumps(settings)), self.out / "settings.json"
        if begun.is_file():
            held = json.loads(begun.read_text(encoding="utf-8"))
            for name in sorted({*settings, *held}):
                if held.get(name) != settings.get(name):
                    raise ValueError(
                        f"{out} holds edits with {name} {held.get(name)!r}, which is {settings.get(name)!r} now; give another folder."
                    )
        elif self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{out} holds other files already; give a folder that is new or empty.")
        else:
            (self.out / "pictures").mkdir(parents=True, exist_ok=True)
            write_text(begun, to_text(settings))
        (self.out / "pictures").mkdir(exist_ok=True)
        for file in filter(Path.is_file, (self.out / "made.jsonl", self.out / "scores.jsonl")):
            append_rows(file, ())  # cuts off what was being written when a run was killed
        self.made = {row["number"]: row for row in read_rows(self.out / "made.jsonl")}
        self.scores = {row["key"]: row["marks"] for row in read_rows(self.out / "scores.jsonl")}
        if (self.out / "spent.json").is_file():
            self.spent = json.loads((self.out / "spent.json").read_text(encoding="utf-8"))

    def run(
        self, pipe: Pipeline, source: PromptSource, judge: Scorer, variety: Variety, budget: Budget = Budget()
    ) -> dict[str, int]:
        """Makes and judges what is missing.

        Args:
          judge: of one reward.

        Returns:
          Counts: 'made', 'duplicates', 'scored', 'failed' (of this run) and 'unasked' (the budget was used up), of which some may
          not have been made.

        Raises:
          ValueError: for a largest cost and a judge that does not say what it costs.
        """
        ((_, entry),) = judge.entries.items()
        if budget.cost is not None and not hasattr(entry.reward, "usage"):
            raise ValueError("This judge counts no tokens, so a largest cost cannot be kept; limit its calls instead.")
        asked: set[str] = set()
        failed, batches = 0, -(-variety.prompts // variety.batch)
        old = self._waiting(asked)
        for start in range(0, len(old), variety.batch * variety.samples):  # what earlier runs have left
            failed += self._judge(old[start : start + variety.batch * variety.samples], asked, judge, budget)
        for step in tqdm(range(batches), desc="editing", unit="batch", disable=None):
            if budget.allows(self.spent) == 0:
                break
            self._make(step, pipe, source, variety)
            failed += self._judge(self._waiting(asked), asked, judge, budget)
        keys = {row["key"] for row in self.made.values()}
        scored = len(keys & self.scores.keys())
        self._write_results(pipe.bundle.default_size, pipe.bundle.patch_pixels, variety.heldout)
        unmade = variety.prompts * variety.samples - len(self.made)
        unasked = len(keys - self.scores.keys()) - failed + max(0, unmade)
        counts = {"made": len(self.made), "duplicates": len(self.made) - len(keys), "scored": scored}
        return {**counts, "failed": failed, "unasked": unasked}

    def _waiting(self, asked: set[str]) -> list[dict[str, Any]]:
        """One line of each different edit that has no score and was not asked about in this run, in order."""
        rows = {row["key"]: row for row in self.made.values()}
        return [row for key, row in rows.items() if key not in self.scores and key not in asked]

    def _make(self, step: int, pipe: Pipeline, source: PromptSource, variety: Variety) -> None:
        """Batch number `step`, as far as it is missing."""
        first = step * variety.batch
        count = min(variety.batch, variety.prompts - first)
        numbers = range(first * variety.samples, (first + count) * variety.samples)
        if all(number in self.made for number in numbers):
            return
        # A whole batch, since a source's batch is a function of its size.
        records = source.batch(step, variety.batch)
        if missing := [record.prompt for record in records if record.image is None]:
            raise ValueError(f"The prompt {missing[0]!r} comes without a picture to edit; use a source of edits.")
        for sentence in dict.fromkeys(record.error for record in records if record.error):
            tqdm.write(f"No edits are made of a picture: {sentence}")
        sound = [i for i in range(len(numbers)) if not records[i // variety.samples].error]
        how = [self._how(number, records, variety) for number in numbers]
        edited: dict[int, np.ndarray] = {}
        kinds = sorted({(how[i]["steps"], how[i]["guidance"]) for i in sound if "steps" in how[i]})
        for steps, guidance in kinds:
            same_how = [i for i in sound if (how[i].get("steps"), how[i].get("guidance")) == (steps, guidance)]
            # Filled up, so that all calls share a program.
            asked = same_how + same_how[-1:] * (-len(same_how) % variety.at_once)
            pictures = pipe(
                [how[i]["for"] for i in asked],
                image=[[records[i // variety.samples].image] for i in asked],
                num_inference_steps=steps,
                guidance_scale=guidance,
                seed=[how[i]["seed"] for i in asked],
                batch_size=variety.at_once,
            ).images
            edited |= {i: np.asarray(picture) for i, picture in zip(same_how, pictures)}
        rows = []
        for i in sound:
            record = records[i // variety.samples]
            rows.append(self._row(numbers[i], record, edited.get(i, record.image), how[i]))
        new = [row for row in rows if row["number"] not in self.made]
        append_rows(self.out / "made.jsonl", new)
        self.made |= {row["number"]: row for row in new}

    def _how(self, number: int, records: Sequence[PromptRecord], variety: Variety) -> dict[str, Any]:
        """How edit number `number` is made: a function of the seed and the number."""
        rng = np.random.default_rng([folded(variety.seed), number])
        kind, other = rng.random(), int(rng.integers(1, max(2, len(records))))
        drawn = {"steps": int(rng.choice(variety.steps)), "guidance": float(rng.choice(variety.guidance))}
        place = number // variety.samples % variety.batch
        if kind < variety.unedited:
            return {"unedited": True}
        mismatched = kind < variety.unedited + variety.mismatched
        prompt = records[(place + other) % len(records) if mismatched else place].prompt
        return {"for": prompt, **drawn, "seed": folded(variety.seed * 1_000_003 + number)}

    def _row(self, number: int, record: PromptRecord, edited: np.ndarray, how: dict[str, Any]) -> dict[str, Any]:
        pictures = [np.ascontiguousarray(picture) for picture in (record.image, edited)]
        digests = [_digest(str(p.shape).encode(), p.tobytes()) for p in pictures]
        files = [f"pictures/{digest}.png" for digest in digests]
        for file, picture in zip(files, pictures):
            if not (self.out / file).is_file():
                part = self.out / f"{file}.{os.getpid()}.part"
                Image.fromarray(picture).save(part, format="PNG")
                os.replace(part, self.out / file)
        key = _digest(digests[0].encode(), record.prompt.encode(), digests[1].encode())
        row = {"number": number, "key": key, "prompt": record.prompt, "source": files[0], "image": files[1]}
        return {**row, "how": how, "metadata": record.metadata}

    def _judge(self, rows: list[dict[str, Any]], asked: set[str], judge: Scorer, budget: Budget) -> int:
        """Asks about edits, as many as the budget allows; how many got no score."""
        rows = rows[: budget.allows(self.spent)]
        if not rows:
            return 0
        ((name, entry),) = judge.entries.items()
        before = _tokens(entry.reward)
        read = lambda row, what: np.asarray(read_image(self.out / row[what]))
        records = [PromptRecord(row["prompt"], read(row, "source"), row["metadata"]) for row in rows]
        scored = judge.score([read(row, "image") for row in rows], records)
        lines = []
        for i, row in enumerate(rows):
            asked.add(row["key"])
            marks = {SCORE: scored.values[name][i], **{d: column[i] for d, column in scored.details[name].items()}}
            if not np.isnan(marks[SCORE]):
                lines.append({"key": row["key"], "marks": {k: float(v) for k, v in marks.items() if not np.isnan(v)}})
        append_rows(self.out / "scores.jsonl", lines)
        self.scores |= {line["key"]: line["marks"] for line in lines}
        used = {what: after - before[what] for what, after in _tokens(entry.reward).items()}
        self.spent = {what: self.spent[what] + ({"calls": len(rows)} | used)[what] for what in self.spent}
        write_text(self.out / "spent.json", json.dumps(self.spent) + "\n")
        for sentence in dict.fromkeys(scored.errors[name].values()):
            tqdm.write(f"The judge failed: {sentence}")
        if budget.cost is not None and entry.reward.usage.answers and not any(_tokens(entry.reward).values()):
            raise ValueError(
                "The judge's answers do not say how many tokens they cost, so a largest cost cannot be kept; limit its calls instead."
            )
        return len(rows) - len(lines)

    def _write_results(self, resolution: int, multiple: int, heldout: float) -> None:
        """scored.jsonl and the shards, from all edits that have a score."""
        unique = {row["key"]: row for row in self.made.values() if row["key"] in self.scores}
        rows = [{**row, "marks": self.scores[key]} for key, row in unique.items()]
        write_text(self.out / "scored.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        # Marks that some edits lack are no targets.
        names = sorted(set.intersection(*(set(row["marks"]) for row in rows))) if rows else []
        for split in ("train", "heldout"):
            split_rows = [row for row in rows if _is_held_out(row["source"], heldout) == (split == "heldout")]
            part = self.out / f"{split}.{os.getpid()}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(self.out / split, ignore_errors=True)
            if split_rows:
                part.mkdir()
                shards = tuple(self._shards(split_rows, names, part))
                index = PreparedIndex(resolution, multiple, shards, tuple(names), {"kept": len(split_rows)})
                write_text(part / INDEX, index.to_json())
                os.replace(part, self.out / split)

    def _shards(self, rows: Sequence[dict[str, Any]], names: Sequence[str], folder: Path) -> Iterable[Shard]:
        buckets: dict[Bucket, list[dict[str, Any]]] = {}
        for row in rows:
            with Image.open(self.out / row["image"]) as picture:
                buckets.setdefault(Bucket(nearest_aspect(*picture.size), 1), []).append(row)
        for bucket, bucket_rows in sorted(buckets.items()):
            for number, start in enumerate(range(0, len(bucket_rows), SHARD_SIZE)):
                file = f"{bucket}-{number:05d}.array_record"
                writer = ArrayRecordWriter(str(folder / file), "group_size:1")
                for row in bucket_rows[start : start + SHARD_SIZE]:
                    image, source = ((self.out / row[what]).read_bytes() for what in ("image", "source"))
                    marks = {name: np.asarray(row["marks"][name], np.float32) for name in names}
                    writer.write(pack(PreparedExample(image, row["prompt"], (source,), marks, row["key"])))
                writer.close()
                yield Shard(file, bucket, len(bucket_rows[start : start + SHARD_SIZE]))


def _tokens(reward: Any) -> dict[str, int]:
    """What a judge has used so far; one that asks nobody has used nothing."""
    usage = getattr(reward, "usage", None)
    return {name: getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")}


def _is_held_out(source: str, part: float) -> bool:
    """By the source picture alone, whatever else is in the folder; its name is its digest."""
    return int(Path(source).stem[:8], 16) < part * 2**32


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
