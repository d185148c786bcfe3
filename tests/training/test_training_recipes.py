"""Every recipe and variant is complete, and the tiny ones can start."""

import importlib

import jax
import pytest

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.models.bundle import load_bundle
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.rewards.scoring import make_entries
from unipic2_jax.training import loop
from unipic2_jax.training.config import validate
from unipic2_jax.training.metrics import read_rows
from unipic2_jax.training.stage import stage_class

TINY = {
    "tiny": ("", "smoke"),
    "tiny_vae": ("", "smoke"),
    "tiny_vlm": ("", "smoke"),
    "tiny_metaquery": ("", "smoke"),
    "pdtr": (
        *("tiny", "tiny,long", "tiny,smoke", "tiny,model=metaquery", "tiny,edit=judge", "tiny,edit=none,guard"),
        *("tiny,joint,edit=judge", "tiny,edit=judge,t2i=none,model=metaquery,fast", "tiny,edit=editreward,t2i=none"),
        "tiny,edit=editreward,model=metaquery,fast",
    ),
    "connector": ("tiny", "tiny,smoke"),
    "kontext": ("tiny", "tiny,smoke"),
    "unified": ("tiny", "tiny,smoke"),
    "unipic2": ("tiny", "tiny,smoke"),
    "finetune": ("tiny", "tiny,smoke", "tiny,smoke,t2i,full"),
    "ablations": ("connector,x", "mllm,x", "connector_only,x,smoke", "joint,x", "judge_geneval,x,smoke"),
}


def recipe(name, arg):
    return validate(importlib.import_module(f"configs.{name}").get_config(arg))


@pytest.mark.parametrize("name,arg", [(name, arg) for name, found in TINY.items() for arg in found])
def test_a_tiny_recipe_can_start(name, arg):
    config, mesh = recipe(name, arg), make_mesh(jax.devices()[:1])
    for stage in config.stages.values():
        stage_class(stage.kind).check(stage, mesh)


@pytest.mark.parametrize("name", ["connector", "kontext", "unified", "unipic2", "finetune"])
def test_a_full_recipe_asks_for_its_data_first(name, tmp_path):
    with pytest.raises(ConfigError, match="prepared data without a path"):
        loop.run(recipe(name, ""), tmp_path / "run")


def test_the_papers_numbers():
    config = recipe("unipic2", "")
    assert config.schedule == ("connector", "kontext", "unified", "edit", "t2i")
    numbers = {name: (s.steps, s.batch_size, s.optimizer.lr) for name, s in config.stages.items() if s.kind == "flow"}
    assert numbers == {
        "connector": (500_000, 1024, 1e-4),
        "kontext": (200_000, 128, 4e-5),
        "unified": (200_000, 128, 4e-5),
    }
    for name in numbers:
        optimizer = config.stages[name].optimizer
        assert (tuple(optimizer.betas), optimizer.eps, optimizer.weight_decay) == ((0.9, 0.95), 1e-8, 0.05)
        assert optimizer.schedule == "cosine" and optimizer.warmup == config.stages[name].steps // 100
    assert (config.stages.kontext.model, config.stages.unified.model) == ("text", None)


def test_what_the_paper_leaves_open_is_in_the_full_recipes():
    config = recipe("unipic2", "")
    for name in ("connector", "kontext", "unified"):
        stage = config.stages[name]
        assert stage.caption_dropout.to_dict() == {"t2i": 0.1, "edit": 0.0}
        assert stage.timesteps.to_dict() == {"kind": "logit_normal", "mean": 0.0, "std": 1.0, "shift": None}
        assert (stage.weighting, stage.optimizer.clip_norm, stage.latents) == ("none", 1.0, "sample")
    assert config.zero_projectors
    # Tiny models have a schedule of their own, and the tiny recipes say so.
    shifts = {
        stage.timesteps.shift
        for name in ("tiny", "tiny_metaquery", "kontext", "connector", "unified")
        for stage in recipe(name, "" if name.startswith("tiny") else "tiny").stages.values()
        if stage.kind == "flow"
    }
    assert shifts == {5.0}


def test_the_full_pdtr_measures_before_and_after():
    def asked(config, **flags):
        """What validation makes of a recipe after some flags."""
        for path, value in flags.items():
            *parents, name = path.split("__")
            node = config
            for part in parents:
                node = node[part]
            node[name] = value
        return validate(config).stages

    full = importlib.import_module("configs.pdtr").get_config
    for config in (full(), importlib.import_module("configs.unipic2").get_config()):
        # One flag on one stage is for all, so that a stage starts from what the one before has ended with.
        found = asked(
            config,
            stages__t2i__evaluations__edit__source__path="heldout.jsonl",
            stages__edit__rewards__editreward__model="DIR",
            stages__t2i__rewards__geneval__detector__device="cpu",
        )
        first, second = found.edit.evaluations, found.t2i.evaluations
        assert first == second and set(first) == {"t2i", "edit"}
        assert (first.t2i.source.kind, first.t2i.num_prompts, first.t2i.samples) == ("geneval", 553, 4)
        assert first.edit.source.path == "heldout.jsonl" and first.edit.rewards == found.edit.rewards
        assert first.t2i.rewards == found.t2i.rewards and first.t2i.rewards.geneval.detector.device == "cpu"
        for evaluation in first.values():
            published = (evaluation.height, evaluation.width, evaluation.num_steps, evaluation.guidance_scale)
            assert published == (512, 512, 50, 3.5) and evaluation.negative_prompt is None
        assert {stage.eval_every for stage in (found.edit, found.t2i)} == {0}
        assert {stage.negative_prompt for stage in (found.edit, found.t2i)} == {None}
    joint = asked(full("joint"), stages__joint__rewards__editreward__model="DIR").joint
    # The records of an evaluation are of no dataset.
    assert joint.evaluations.edit.rewards.to_dict() == {"editreward": {"weight": 1.0, "model": "DIR"}}
    assert set(asked(full("t2i=none")).edit.evaluations) == {"t2i", "edit"}
    assert set(asked(full("edit=none")).t2i.evaluations) == {"t2i"}


def test_words_that_a_recipe_does_not_know():
    for name in ("connector", "kontext", "unified", "unipic2"):
        with pytest.raises(ValueError, match="has no variant 'tin'"):
            recipe(name, "tin")
        with pytest.raises(ValueError, match="write tiny,smoke"):
            recipe(name, "smoke")


@pytest.mark.slow
def test_the_whole_paper_in_a_few_steps(tmp_path):
    config = recipe("unipic2", "tiny,smoke")
    folder = loop.run(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert {row["stage"] for row in rows if row["kind"] == "train"} == set(config.schedule)
    assert "conditioner" in load_bundle(folder).params["conditioner"]


def test_the_words_of_pdtr():
    full = recipe("pdtr", "edit=judge,t2i=geneval,model=metaquery,fast,guard")
    assert full.model == "unipic2_metaquery" and full.schedule == ("edit", "t2i")
    assert list(full.stages.edit.rewards) == ["judge"] and list(full.stages.t2i.rewards) == ["geneval"]
    for stage in full.stages.values():
        assert stage.grpo.window.to_dict() == {"size": 2, "low": 0, "high": 5}
        assert stage.grpo.guard and not stage.grpo.cfg_in_window
    assert list(recipe("pdtr", "").stages.edit.rewards) == ["editreward"]
    assert recipe("pdtr", "edit=none").schedule == ("t2i",) and recipe("pdtr", "t2i=none").schedule == ("edit",)
    remote = importlib.import_module("configs.pdtr").get_config("t2i=geneval,detector=remote")
    remote.stages.t2i.rewards.geneval.url = "http://gpu:18100"
    remote = validate(remote)
    for rewards in (remote.stages.t2i.rewards, remote.stages.edit.evaluations.t2i.rewards):
        assert rewards.geneval.to_dict() == {"kind": "remote", "weight": 1.0, "url": "http://gpu:18100"}
    assert make_entries(remote.stages.t2i.rewards)["geneval"].reward.endpoint.url == "http://gpu:18100/score"
    watched = recipe("pdtr", "watch=judge").stages.edit.rewards
    assert {name: fields.weight for name, fields in watched.items()} == {"editreward": 1.0, "judge": 0.0}
    tiny = recipe("pdtr", "tiny,edit=editreward,joint").stages.joint
    rewards = {name: (fields.weight, fields.datasets) for name, fields in tiny.rewards.items()}
    assert rewards == {
        "editreward": (1.0, ("edit",)),
        "shapes_edit": (0.0, ("edit",)),
        "shapes_t2i": (1.0, ("t2i",)),
    }
    # What tells right samples apart by noise alone must not become full advantages.
    of_batch = [
        [stage.grpo.global_std for stage in recipe("pdtr", f"tiny,{words}").stages.values()]
        for words in ("", "edit=judge", "edit=editreward", "edit=editreward,joint", "joint")
    ]
    assert of_batch == [[False, False], [True, False], [True, False], [True], [False]]
    of_batch = [
        [stage.grpo.global_std for stage in recipe("pdtr", words).stages.values()]
        for words in ("", "edit=judge", "edit=none", "joint", "model=metaquery")
    ]
    assert of_batch == [[True, False], [True, False], [False], [True], [True, False]]
    other = recipe("pdtr", "algorithm=nft")
    for stage in other.stages.values():
        assert (stage.kind, stage.num_prompts, stage.nft.group_size, stage.optimizer.name) == ("nft", 48, 24, "adamw")
        assert "grpo" not in stage and {fields.guidance_scale for fields in stage.evaluations.values()} == {1.0}
    tiny = recipe("pdtr", "tiny,algorithm=nft,joint,edit=judge").stages.joint
    assert tiny.kind == "nft" and tiny.source.kind == "turns" and not tiny.same_latent and tiny.nft.solver == "euler"
    wrong = {
        "tiny,algorithm=nft,guard": "asks for 'guard', which is GRPO's",
        "algorithm=ppo": "no variant 'algorithm=ppo'",
        "edit=nobody": "no variant 'edit=nobody'; combine some of tiny",
        "colour": "no variant 'colour'",
        "edit=judge,edit=none": "makes a choice twice",
        "long": "write 'tiny' too",
        "edit=none,t2i=none": "leaves out what it is about",
        "joint,edit=none": "leaves out what it is about",
        "tiny,detector=remote": "no detector to place",
        "t2i=none,detector=remote": "no detector to place",
        "watch=editreward": "nothing new for watch=editreward",
        "tiny,watch=judge": "nothing new for watch=judge",
    }
    for words, sentence in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            importlib.import_module("configs.pdtr").get_config(words)
