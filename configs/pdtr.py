"""PDTR: reinforce editing first, then text-to-image (paper section 3.2; hyper-parameters from section 4.1).

`configs/pdtr.py` is the paper's run and wants a model, prompts and an EditReward of yours:

    --config.init=DIR --config.stages.edit.source.path=edits.jsonl --config.stages.t2i.source.path=prompts.jsonl \\
        --config.stages.edit.rewards.editreward.model=DIR

Words after a colon, with commas between them, change it:

| word | |
|---|---|
| `edit=editreward`, `edit=judge`, `edit=none` | what rewards edits: a trained EditReward (the default), a judge's marks, or no such stage |
| `t2i=geneval`, `t2i=none` | what rewards pictures from text: GenEval's rules on a detector's findings, or no such stage |
| `detector=own`, `detector=remote` | where GenEval's detector runs: on the process's own GPU, or behind `launch.serve_reward` on another machine (`--config.stages.t2i.rewards.geneval.url=http://HOST:PORT`), which is how TPU hosts have one |
| `algorithm=grpo`, `algorithm=nft` | how rewards change the model: Flow-GRPO, the paper's (the default), or DiffusionNFT, without guidance |
| `model=kontext`, `model=metaquery` | which model: text encoders, or Qwen2.5-VL (`--config.vlm=DIR`) |
| `fast` | two steps of a rollout are stochastic and trained, without guidance; the others are deterministic |
| `guard` | GRPO-Guard's ratios |
| `watch=editreward`, `watch=judge` | a second reward of edits that is only watched, so that it shows when the trained one is learned instead of the task |
| `joint` | both tasks in turn in one stage, against which the paper's order can be held |
| `tiny` | UniPic2-Tiny in the shapes world, in minutes on a CPU; `tiny,long` about half an hour, `tiny,smoke` a few seconds |

At tiny scale edits are rewarded by the exact verifier unless `edit=` says otherwise: `edit=editreward` is the tiny EditReward
that `make tiny-edit-reward` trains, `edit=judge` the verifier with noise; the verifier is then watched beside them.
"""

import math

from ml_collections import ConfigDict

from unipic2_jax.core.assets import TINY, TINY_EDIT_REWARD, TINY_METAQUERY
from unipic2_jax.shapes.heldout import SIZE, evaluations
from unipic2_jax.training.config import make_config

# The rewards that can be chosen at full size. Flags reach their fields by their names, as in
# --config.stages.t2i.rewards.geneval.detector.device=cpu.
REWARDS = {
    "edit": {
        "editreward": {"editreward": {"weight": 1.0, "model": ""}},
        "judge": {"judge": {"weight": 1.0, "base_url": "https://api.openai.com/v1", "model": "gpt-4.1"}},
    },
    "t2i": {
        "geneval": {
            "geneval": {
                "weight": 1.0,
                "exact": False,
                "detector": {
                    "kind": "mask2former",
                    "model": "facebook/mask2former-swin-small-coco-instance",
                    "clip": "openai/clip-vit-large-patch14",
                    "device": "cuda",
                },
            }
        }
    },
}
# GenEval's rules and detector on a machine that has a GPU: `python -m launch.serve_reward --reward=geneval` there.
REMOTE = {"geneval": {"kind": "remote", "weight": 1.0, "url": ""}}
# Of the tiny judge's marks: about as much as the samples of a group differ by.
JUDGE_NOISE = 0.2
WATCHED = {"shapes_edit": {"weight": 0.0}}
TINY_REWARDS = {
    "edit": {
        "verifier": {"shapes_edit": {"weight": 1.0}},
        "editreward": {"editreward": {"weight": 1.0, "model": TINY_EDIT_REWARD, "combine": "score"}, **WATCHED},
        "judge": {"judge": {"kind": "shapes_edit", "noise": JUDGE_NOISE, "weight": 1.0}, **WATCHED},
    },
    "t2i": {"geneval": {"shapes_t2i": {"weight": 1.0}}},
}
# Rewards that are never equal: of samples that are all right, they tell noise apart. The std of the group would make full advantages
# of that, the std of the whole batch leaves it as small as it is. The paper's formula, with the group's, stays for exact rewards.
INEXACT = {"editreward", "judge"}
CHOICES = {
    "edit": ("editreward", "judge", "none"),
    "t2i": ("geneval", "none"),
    "detector": ("own", "remote"),
    "model": ("kontext", "metaquery"),
    "algorithm": ("grpo", "nft"),
    "watch": ("editreward", "judge"),
}
FLAGS = ("tiny", "long", "smoke", "fast", "guard", "joint")


# One turn through the training prompts at tiny scale: what the base often gets wrong comes more often, because a group whose
# samples are all right, or all wrong, teaches nothing.
TURNS = {
    "edit": ("add", "arrange", "replace", "recolor", "arrange", "replace", "move"),
    "t2i": ("counting", "position", "color_attr", "two_object", "counting", "position", "single_object"),
}


# What the paper leaves open, for every stage at full size; docs/rl.md has the table with what others do. The std of advantages is
# set where the rewards are known, in `get_config`.
OPEN = {
    "guidance_scale": 3.5,
    "stop_gradient_uncond": False,
    "skip_zero_advantage": False,
    "updates_per_rollout": 2,
}


def full_stage(task: str, rewards: dict) -> dict:
    """A stage with the paper's hyper-parameters, which are the defaults of the GRPO stage."""
    return {
        "kind": "grpo",
        "steps": 1000,
        "eval_every": 0,  # before and after only
        "source": {"kind": "jsonl", "path": "", "task": task},
        "rewards": rewards,
        # In groups of 16 that is the paper's "global batch 256", read as the samples of a rollout: 128 an optimizer step.
        "num_prompts": 16,
        "audit_every": 50,
        "negative_prompt": None,  # the model's own: for edits the published quality string
        # The plan chooses how an update is computed: what the backward pass finds of the forward pass, and in how many parts.
        "remat": "auto",
        "batch_branches": True,
        "grpo": {"micro_batch": 0, **OPEN},
    }


def full_evaluations(rewards: dict[str, dict], guidance_scale: float) -> dict:
    """What is measured before and after each stage, as the published scripts draw: GenEval's 553 prompts with four pictures of each,
    which is its protocol, and two edits of each of at most 256 held-out pictures, once `source.path` names them.

    In evaluations of the transformer that is 43 rollouts for text-to-image and 10 for edits, and each picture is scored once.
    """
    shared = {
        "height": 512,
        "width": 512,
        "num_steps": 50,
        "guidance_scale": guidance_scale,
        "negative_prompt": None,
        "seed": 1000,
    }
    # GenEval also tells what a run on edits alone does to text-to-image; its detector needs nothing of the user's.
    t2i = {"source": {"kind": "geneval"}, "rewards": rewards.get("t2i", REWARDS["t2i"]["geneval"])}
    evaluations = {"t2i": {**t2i, "num_prompts": 553, "samples": 4, **shared}}
    if "edit" in rewards:
        source = {"kind": "jsonl", "path": "", "task": "edit"}
        evaluations["edit"] = {"source": source, "rewards": rewards["edit"], "num_prompts": 256, "samples": 2, **shared}
    return evaluations


def share_evaluations(config: ConfigDict) -> ConfigDict:
    """The same evaluations in all stages of reinforcement, by the rewards as they are trained on: a flag on one is for all of them.

    A stage can then start from what the one before has ended with, without measuring it again.
    """
    stages = [stage for stage in config.stages.values() if "rewards" in stage]
    for stage in stages:
        stage.evaluations = stages[0].evaluations
        for evaluation in stage.evaluations.values():
            for name in {*evaluation.rewards} & {*stage.rewards}:
                own, trained = evaluation.rewards[name], stage.rewards[name]
                for field in own:
                    own[field] = trained[field] if isinstance(trained[field], ConfigDict) else trained.get_ref(field)
    return config


# Rollouts of the tiny stages. A group shares its first noise and differs by one stochastic step, so that all of what its
# rewards differ by is credited to the step that is trained. Which steps was found by trying: an edit is decided by the first
# ones, while a picture from text is mended later (smears, half objects), and early noise tells little about it.
ROLLOUT = {
    "edit": {"num_steps": 6, "window": {"size": 1, "low": 0, "high": 4}},
    # A stronger KL than the paper's 0.04 keeps what editing has gained.
    "t2i": {"num_steps": 8, "window": {"size": 1, "low": 3, "high": 6}, "kl_beta": 1.0},
    # Any step that either of them trains.
    "joint": {"num_steps": 8, "window": {"size": 1, "low": 0, "high": 6}, "kl_beta": 0.2},
}


# Steps and learning rate of the variants. The paper's 3e-4 is for many more steps; text-to-image, whose rewards are noisier,
# takes smaller ones so that editing does not suffer.
LENGTH = {
    "grpo": {
        "demo": {"edit": (110, 1e-3), "t2i": (120, 5.5e-4)},
        "long": {"edit": (300, 7e-4), "t2i": (400, 4e-4)},
        "smoke": {"edit": (2, 1e-3), "t2i": (2, 1e-3)},
    },
    "nft": {  # of which only the demo's for edits were tried
        "demo": {"edit": (60, 5e-4), "t2i": (60, 5e-4)},
        "long": {"edit": (150, 4e-4), "t2i": (200, 3e-4)},
        "smoke": {"edit": (2, 1e-3), "t2i": (2, 1e-3)},
    },
}


# DiffusionNFT as its authors run it on SD3.5-Medium with GenEval: 48 groups of 24 and one optimizer step a rollout. Its other fields
# have those defaults.
NFT = {"num_prompts": 48, "optimizer": {"name": "adamw", "lr": 3e-4, "weight_decay": 1e-4}}
# The shapes world has its own numbers, as for GRPO. In rollouts of so few steps Euler's are the better ones: in its last but one,
# `dpm2` goes on by more than twice the last change. Two noise levels a sample cost a third of what all of them do. With the authors' KL
# of 1e-4 and a rate of 1e-3, text-to-image was lost while editing gained.
TINY_NFT = {"group_size": 16, "solver": "euler", "timestep_fraction": 0.34, "kl_beta": 0.05}


def with_nft(stage: dict, tiny: bool) -> dict:
    """The stage with DiffusionNFT instead of GRPO; of the fields of GRPO those go along that both have."""
    grpo = stage.pop("grpo")
    if not tiny:
        return {**stage, **NFT, "kind": "nft", "nft": {"micro_batch": grpo["micro_batch"]}}
    return {**stage, "kind": "nft", "same_latent": False, "nft": {"num_steps": grpo["num_steps"], **TINY_NFT}}


def tiny_stage(task: str, rewards: dict, steps: int, lr: float, num_prompts: int = 14) -> dict:
    """The same stage with the sizes and counts of the shapes world."""
    return {
        "kind": "grpo",
        "steps": steps,
        "save_every": 20,
        "source": {"kind": "shapes", "task": task, "tags": TURNS[task]},
        "rewards": rewards,
        **SIZE,
        "num_prompts": num_prompts,
        "sampling_batches": 1,  # nothing to overlap: what samples and what scores share the cores
        "same_latent": True,
        "grpo": {**ROLLOUT[task], "guidance_scale": 1.0},
        "optimizer": {"lr": lr, "warmup": min(5, steps - 1)},
    }


def joined(stages: dict[str, dict], tiny: bool) -> dict:
    """Both stages as one in which they take turns: the steps of both, everything else as in the second.

    At tiny scale the stages' own settings differ; one that serves both lies between them and was not searched for.
    """
    rewards = {
        name: {**fields, "datasets": (task,)}
        for task, stage in stages.items()
        for name, fields in stage["rewards"].items()
    }
    source = {"kind": "turns", "sources": {task: stage["source"] for task, stage in stages.items()}}
    steps = sum(stage["steps"] for stage in stages.values())
    joint = {**stages["t2i"], "steps": steps, "source": source, "rewards": rewards}
    if tiny:
        lr = math.prod(stage["optimizer"]["lr"] for stage in stages.values()) ** 0.5
        joint |= {"grpo": {**joint["grpo"], **ROLLOUT["joint"]}, "optimizer": {**joint["optimizer"], "lr": lr}}
    return joint


def read_words(arg: str) -> tuple[set[str], dict[str, str]]:
    """The flags among the words, and the choices that were made.

    Raises:
      ValueError: for an unknown word, or words that contradict each other.
    """
    words = {word for word in arg.split(",") if word}
    flags = {word for word in words if "=" not in word}
    made = dict(word.split("=", 1) for word in words - flags)
    unknown = (flags - set(FLAGS)) | {f"{k}={v}" for k, v in made.items() if v not in CHOICES.get(k, ())}
    if unknown:
        known = [*FLAGS, *(f"{name}={value}" for name, values in CHOICES.items() for value in values)]
        raise ValueError(f"configs/pdtr.py has no variant '{min(unknown)}'; combine some of {', '.join(known)}.")
    if len(made) < len(words - flags):
        raise ValueError(f"configs/pdtr.py:{arg} makes a choice twice; make each once.")
    if flags & {"long", "smoke"} and "tiny" not in flags:
        raise ValueError(f"configs/pdtr.py:{arg} names a length of tiny runs; write 'tiny' too.")
    without = [task for task in ("edit", "t2i") if made.get(task) == "none"]
    if len(without) == 2 or (without and "joint" in flags):
        raise ValueError(f"configs/pdtr.py:{arg} leaves out what it is about; leave out {without[0]}=none instead.")
    if made.get("algorithm") == "nft" and (own := flags & {"fast", "guard"}):
        raise ValueError(
            f"configs/pdtr.py:{arg} asks for '{min(own)}', which is GRPO's; leave it or algorithm=nft out."
        )
    if "detector" in made and ("tiny" in flags or made.get("t2i") == "none"):
        raise ValueError(f"configs/pdtr.py:{arg} has no detector to place; leave detector={made['detector']} out.")
    watched = made.get("watch")
    if watched and ("tiny" in flags or made.get("edit", "editreward") in ("none", watched)):
        raise ValueError(f"configs/pdtr.py:{arg} has nothing new for watch={watched} to watch; leave it out.")
    return flags, made


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a comma-separated list of words, see above."""
    flags, made = read_words(arg)
    tiny, smoke, metaquery = "tiny" in flags, "smoke" in flags, made.get("model") == "metaquery"
    known, algorithm = TINY_REWARDS if tiny else REWARDS, made.get("algorithm", "grpo")
    # What rewards each task; the first is the default.
    rewards = {task: known[task][made.get(task, next(iter(known[task])))] for task in known if made.get(task) != "none"}
    if made.get("detector") == "remote":
        rewards["t2i"] = REMOTE
    if watched := made.get("watch"):
        rewards["edit"] = {**rewards["edit"], watched: {**known["edit"][watched][watched], "weight": 0.0}}
    if tiny:
        length = LENGTH[algorithm]["smoke" if smoke else "long" if "long" in flags else "demo"]
        stages = {
            task: tiny_stage(task, task_rewards, *length[task], 2 if smoke else 14)
            for task, task_rewards in rewards.items()
        }
        model = {"init": TINY_METAQUERY, "model": "tiny_metaquery"} if metaquery else {"init": TINY, "model": "tiny"}
    else:
        stages = {task: full_stage(task, task_rewards) for task, task_rewards in rewards.items()}
        size = "unipic2_metaquery" if metaquery else "sd35_medium"
        model = {"model": size, "init": None, "precision": "mixed", "parallel": {"preset": "auto"}}
    if "joint" in flags:
        stages = {"joint": joined(stages, tiny)}
    for name, stage in stages.items():
        if "fast" in flags and not tiny:  # tiny rollouts are that already
            stage["grpo"] |= {"window": {"size": 2, "low": 0, "high": 5}, "cfg_in_window": False}
        if "guard" in flags:
            stage["grpo"] |= {"guard": True}
        stage["grpo"] |= {"global_std": bool(INEXACT & set(stage["rewards"]))}
        if tiny:
            stage["evaluations"] = evaluations(6, 1) if smoke else evaluations(750, 2)
        else:
            # As the published scripts draw; DiffusionNFT's pictures have no guidance, which is what the policy becomes good at.
            stage["evaluations"] = full_evaluations(rewards, 1.0 if algorithm == "nft" else 3.5)
        if algorithm == "nft":
            stages[name] = with_nft(stage, tiny)
    return share_evaluations(make_config({**model, "schedule": tuple(stages), "stages": stages}))
