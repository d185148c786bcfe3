"""Plans: tables, advice, slices and mistakes on descriptions; arithmetic against the compiler's own figures."""

import dataclasses
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.models import attention
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.perf import described, plan, plan_report
from unipic2_jax.perf.counting import jaxpr_flops
from unipic2_jax.perf.liveness import measure
from unipic2_jax.perf.topology import SLICES, has_compiler, read_topology
from unipic2_jax.training.config import unplanned, validate

ROOT = Path(__file__).resolve().parents[2]
GPUS = read_topology("gpu:8xh200")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="The compiler for TPUs is not installed (`pip install -r requirements-tpu.txt`).",
)
needs_cuda = pytest.mark.skipif(
    not has_compiler(GPUS), reason="The compiler for GPUs is not installed (`pip install -r requirements-cuda.txt`)."
)


@pytest.fixture(autouse=True)
def without_flags(monkeypatch):
    """The compiler for TPUs ends the process at a flag for CPUs; the CPU's own has read them before."""
    jax.devices()
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def recipe(name, arg="", **changes):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config.update_from_flattened_dict(changes)
    return validate(config)


def command(*arguments, **variables):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-m", "launch.plan", *arguments], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def counted():
    config = recipe("kontext", "tiny", **{"parallel.preset": "fsdp", "schedule": ("kontext",)})
    said = []
    return plan.plan(config, GPUS, log=said.append, count=True), config, said


def cost(**fields):
    nothing = dict.fromkeys(("parameters", "optimizer", "batch", "results", "activations", "single", "moved"), 0.0)
    base = {"stage": "kontext", "name": "step", "calls": 1.0, "flops": 1e12, "model_flops": 1e12, "collectives": {}}
    return plan.Cost(**{**base, **nothing, **fields})


def test_topologies():
    assert (read_topology("v5p:4x4x4").count, read_topology("v5e:8x16").count, GPUS.count) == (64, 128, 8)
    one, two = read_topology("gpu:8xh100"), read_topology("gpu:16xh100")
    assert (one.nodes, two.nodes) == (1, 2) and one.memory == 0.75 * one.chip.memory  # of JAX's pool
    for kind, shapes in SLICES.items():
        found = list(read_topology(f"gpu:8x{kind}" if kind[0] in "hb" else f"{kind}:2x2").larger())
        assert len(found) == len(shapes) and all(a.count < b.count for a, b in itertools.pairwise(found))
    for text in ("v4:2x2x2", "v5p", "v5p:64", "gpu:h100", "gpu:0xh100", "v5p:4x0x4"):
        with pytest.raises(ConfigError, match="is unknown; write v5p:4x4x4"):
            read_topology(text)
    with pytest.raises(ConfigError, match=r"The chip 'a100' .* is unknown; there are h100, h200, b200"):
        read_topology("gpu:8xa100")
    with pytest.raises(ConfigError, match="whole nodes; take a multiple of 8"):
        read_topology("gpu:12xh100")


def test_a_step_on_gpus_by_arithmetic(counted):
    made, _, said = counted
    (planned,), costs = made.stages, made.costs
    assert [c.name for c in costs["kontext"]] == ["step, edit 48x48 + 1 reference(s)", "step, t2i 48x48"]
    assert len(said) == 2 and all("counted" in sentence for sentence in said)
    mesh = make_mesh(jax.devices()[:1])
    edit = costs["kontext"][0]
    trained, moments, averages = (described.local_bytes(x, mesh) for x in planned.state().values())
    frozen = described.local_bytes(planned.parameters, mesh)
    # All but biases, norms and the VAE is split in eight.
    assert (trained + frozen) / 8 < edit.parameters < (trained + frozen) / 3
    assert (moments + averages) / 8 < edit.optimizer < (moments + averages) / 5
    assert 0 < edit.results < 1000  # the new state takes the place of the old one: metrics only
    assert edit.peak == sum((edit.parameters, edit.optimizer, edit.batch, edit.results, edit.activations))
    # The step computes its forward pass again, and reads pictures and prompts.
    assert 4 / 3 < edit.flops / edit.model_flops < 2.5 and edit.single == edit.flops
    assert set(edit.collectives) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert trained / 2 < edit.collectives["reduce-scatter"] < trained
    assert edit.collectives["all-gather"] > 2 * edit.collectives["reduce-scatter"]  # forward and backward
    assert sum(c.calls for c in costs["kontext"]) == 1.0


def test_copies_instead_of_parts():
    config = recipe("kontext", "tiny", schedule=("kontext",))
    costs = plan.plan(config, GPUS, count=True, only=lambda planned, program: "t2i" in program.name).costs["kontext"]
    # T5 alone is in parts.
    assert set(costs[0].collectives) == {"all-gather", "all-reduce"}
    assert (
        costs[0].optimizer > 3 * costs[0].collectives["all-reduce"] / 2
    )  # two moments and an average of all that is summed


def test_every_program_of_reinforcement():
    config = recipe("pdtr", "tiny,smoke", **{"parallel.preset": "fsdp", "schedule": ("edit",)})
    costs = plan.plan(config, read_topology("gpu:2xh100"), count=True).costs["edit"]
    assert [c.name for c in costs] == ["encode", "rollout", "decode", "update"]
    assert all(c.flops > 0 and c.activations > 0 and c.moved > 0 for c in costs)
    assert {c.name for c in costs if c.model_flops} == {"rollout", "update"}


@pytest.mark.parametrize("remat", ["full", "none"])
def test_what_is_held_is_about_what_the_compiler_holds(remat):
    config = MMDiTConfig(
        num_layers=4,
        dual_attention_layers=(0, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=128,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        sample_size=32,
    )
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    given = (struct(4, 32, 32, 16), struct(4), struct(4, 32, 128), struct(4, 64))
    model = MMDiT(config, remat=remat)
    params = jax.eval_shape(model.init, jax.random.key(0), *given)["params"]
    gradient = jax.jit(jax.grad(lambda params, *given: (model.apply({"params": params}, *given) ** 2).mean()))
    traced = gradient.trace(params, *given)
    counted = measure(traced, [1.0] * len(jax.tree.leaves(params)) + [None] * len(given))
    compiled = traced.lower().compile().memory_analysis()
    assert counted.results == pytest.approx(compiled.output_size_in_bytes, rel=1e-3)
    # XLA's CPU backend fuses less than those for accelerators.
    assert 0.45 < counted.held / compiled.temp_size_in_bytes < 1.5


def test_loops_hold_what_they_keep_for_the_way_back():
    layers, rows, width = 12, 64, 32
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    # Of tanh JAX keeps one array or two, by its version; of sin one.
    layer = lambda x, w: (jnp.sin(x @ w), None)
    loss = lambda body: jax.jit(jax.grad(lambda w, x: jax.lax.scan(body, x, w)[0].sum()))
    held = measure(loss(layer).trace(weights, x), [1.0, None]).held
    size = rows * width * 4
    assert layers * size <= held <= (2 * layers + 6) * size
    # A chip that has a quarter of every matrix gathers each on the way there and on the way back.
    split = measure(loss(layer).trace(weights, x), [0.25, None])
    assert split.gathered == 2 * layers * width * width * 4
    assert split.results == layers * width * width * 4 / 4


def test_flash_attention_holds_no_logits():
    shape = jax.ShapeDtypeStruct((2, 4, 512, 16), jnp.bfloat16)

    def attend(q, k, v):
        logits = jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=jnp.float32)
        return jnp.einsum("bnqk,bnkd->bnqd", jnp.exp(logits).astype(v.dtype), v)

    traced = jax.jit(attend).trace(shape, shape, shape)
    logits = 2 * 4 * 512 * 512 * 4
    assert measure(traced, [None] * 3, flash=True).held < logits / 8 < logits <= measure(traced, [None] * 3).held


def test_attention_is_counted_alike_where_its_kernel_is_there(monkeypatch):
    """A run on a GPU prices its splits there, where attention is a primitive of its own."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    shape = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)  # even: padding takes memory of its own

    def work(platform):
        # Another function each time: what was traced before is not traced again.
        loss = lambda q, k, v: jnp.sum(attention.attention(q, k, v).astype(jnp.float32))
        monkeypatch.setattr(attention, "platform", lambda: platform)
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(shape, shape, shape)
        return measure(traced, [None] * 3, flash=True), jaxpr_flops(traced.jaxpr.jaxpr)

    (here, flops), (there, kernel_flops) = work("cpu"), work("gpu")
    assert 0.3 < there.moved / here.moved < 1.5 and 0.3 < there.held / here.held < 1.5
    # The backward pass computes the logits again.
    assert kernel_flops == pytest.approx(7 / 6 * flops, rel=0.01)


def test_the_table(counted):
    costs = counted[0].costs
    text = plan_report.table(costs, GPUS).splitlines()
    assert len(text) == 5 and len({line.count("|") for line in text}) == 1
    assert "step, edit 48x48" in text[2] and "all-gather" in text[2] and "too much" not in text[2]
    assert "a step, on the average" in text[4]
    lost = plan_report.table({"kontext": [cost(activations=200e9, moved=None, collectives=None)]}, GPUS)
    assert "**too much**" in lost and "not compiled" in lost


def test_advice():
    whole = {"stages.kontext.remat": "full", "stages.kontext.accumulation": 1}
    config = recipe("kontext", **{"parallel.preset": "ddp"}, **whole)
    say = lambda config, on=GPUS, **fields: plan_report.advice(config, {"kontext": [cost(**fields)]}, on)
    assert say(config, activations=100e9) == []
    (sentence,) = say(config, activations=200e9)
    assert sentence.startswith("Stage 'kontext' needs 200.0 GB of 113.5 GB a chip (step); ")
    # What splits tokens cannot be counted, and so is no advice for GPUs.
    assert "accumulation=2" in sentence and "fsdp_sp" not in sentence
    (sentence,) = say(config, on=read_topology("v5p:4x4x4"), activations=200e9)
    assert "accumulation=2" in sentence and "fsdp_sp" in sentence
    (sentence,) = say(config, on=read_topology("v5p:4x4x8"), activations=200e9)  # a sample a chip has no parts
    assert "accumulation" not in sentence and "fsdp_sp" in sentence
    (sentence,) = say(config, parameters=200e9)
    assert "preset=fsdp." in sentence
    (sentence,) = say(recipe("kontext", **{"parallel.preset": "fsdp"}, **whole), parameters=200e9)
    assert "larger slice" in sentence
    parts = {"stages.edit.remat": "full", "stages.edit.grpo.micro_batch": 32}
    reinforced = recipe("pdtr", **{"parallel.preset": "fsdp"}, **parts)
    for name, remedy in {"update": "micro_batch=16", "rollout": "num_prompts=8"}.items():
        costs = {"edit": [cost(stage="edit", name=name, activations=200e9)]}
        (sentence,) = plan_report.advice(reinforced, costs, GPUS)
        assert remedy in sentence and "fsdp_sp" not in sentence
        (sentence,) = plan_report.advice(reinforced, costs, read_topology("v5p:4x4x4"))
        assert "micro_batch" not in sentence and "fsdp_sp" in sentence  # 64 chips have a sample each as it is


def large(made, activations):
    costs = {name: [dataclasses.replace(c, activations=activations) for c in rows] for name, rows in made.costs.items()}
    return dataclasses.replace(made, costs=costs)


def test_the_smallest_slice(counted):
    made, config, _ = counted
    found, uneven = plan_report.smallest(config, made, GPUS)
    assert (found.name, uneven) == ("gpu:1xh200", [])
    sentence = plan_report.smallest_sentence(config, made, GPUS, "confirm", plan.Cache(None), lambda line: None)
    assert sentence.startswith("The smallest slice that fits: gpu:1xh200, confirmed")
    # As much for each row as eight chips hold for an eighth of the batch: two chips have four times as much.
    found, _ = plan_report.smallest(config, large(made, 25e9), GPUS)
    assert found.name == "gpu:2xh200"
    too_large = large(made, 1e15)
    assert "No slice of h200" in plan_report.smallest_sentence(
        config, too_large, GPUS, "estimate", plan.Cache(None), print
    )


def test_what_is_kept_between_plans(tmp_path):
    cache, tpu = plan.Cache(tmp_path), read_topology("v5p:2x2x1")
    key = cache.key("text", tpu, "recipe")
    assert key != cache.key("another", tpu, "recipe") and key != cache.key("text", read_topology("v5p:2x2x2"), "recipe")
    assert cache.read(key) is None
    cache.write(key, {"temporary": 1.0})
    assert plan.Cache(tmp_path).read(key) == {"temporary": 1.0} and plan.Cache("").read(key) is None
    plan.Cache("").write(key, {})


def test_batches_that_do_not_come_out_even():
    config = recipe("kontext", "tiny", **{"schedule": ("kontext",), "stages.kontext.batch_size": 60})
    with pytest.raises(ConfigError, match=r"config.stages.kontext: A batch of 60 cannot"):
        plan.plan(config, GPUS, count=True)
    with pytest.raises(ConfigError, match="samples cannot be split"):
        plan.plan(recipe("pdtr", "tiny"), read_topology("gpu:5xh100"), count=True)
    with pytest.raises(ConfigError, match=r"micro-batches of 96 on 64 devices; choose .*grpo\.micro_batch that divide"):
        uneven = {"stages.edit.grpo.micro_batch": 96, "parallel.preset": "ddp"}
        plan.plan(recipe("pdtr", **uneven), read_topology("gpu:64xh100"), count=True)
    with pytest.raises(ConfigError, match="that works for batches split over all chips only"):
        plan.plan(recipe("kontext", "tiny", **{"parallel.preset": "fsdp_tp"}), GPUS, count=True)
    with pytest.raises(ConfigError, match="does not fit 5 devices"):
        plan.plan(recipe("kontext", "tiny", **{"parallel.preset": "fsdp_tp"}), read_topology("gpu:5xh100"), count=True)


def test_groups_on_several_chips_are_counted():
    """A chip's products are its share of the samples, whether its part is whole prompts or a part of one's group."""

    def update(prompts, group):
        changes = {"stages.edit.num_prompts": prompts, "stages.edit.grpo.group_size": group, "schedule": ("edit",)}
        config = recipe("pdtr", "tiny", **changes)
        (found,) = [c for c in plan.plan(config, GPUS, count=True).costs["edit"] if c.name == "update"]
        return found.flops, found.activations

    assert update(2, 32) == update(8, 8)  # 8 samples of each chip


NOTHING = {"only": lambda planned, program: False}


def test_a_micro_batch_has_a_sample_for_every_chip():
    small = {"schedule": ("edit",), "stages.edit.num_prompts": 16, "stages.edit.grpo.micro_batch": 8}
    said = []
    (planned,) = plan.plan(
        recipe("pdtr", "tiny", **small), read_topology("gpu:16xh100"), log=said.append, **NOTHING
    ).stages
    assert said == ["edit: micro_batch is 16 instead of 8, a sample for each device."]
    (update,) = [program for program in planned.programs if program.name == "update"]
    assert update.gradients == 16 * 16 // 16  # samples, of which 16 are computed at once


def test_a_plan_keeps_jax_on_the_cpu_before_a_recipe_imports_it():
    """Without that JAX looks for the GPUs that its plugin is for, finds none, and then compiles for none."""
    code = (
        "from launch import plan; plan.parse(['plan', '--config=configs/kontext.py:tiny', '--topology=gpu:8xh100']); "
        "import jax; print(jax.config.jax_platforms)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "cpu\n", done.stderr


def test_the_command_of_the_readme_is_one():
    assert "python -m launch.plan --config=configs/pdtr.py --topology=gpu:8xh100`" in (ROOT / "README.md").read_text()


@needs_libtpu
def test_the_full_recipe_can_be_planned_for_more_chips_than_a_micro_batch_has_samples():
    """`launch.plan --config=configs/pdtr.py --topology=v5p:4x4x4`, up to the compiler."""
    said = []
    small = {f"stages.{name}.grpo.micro_batch": 32 for name in ("edit", "t2i")}
    config = unplanned(recipe("pdtr", **{"parallel.preset": "fsdp"}, **small))
    made = plan.plan(config, read_topology("v5p:4x4x4"), log=said.append, **NOTHING)
    assert [stage.name for stage in made.stages] == ["edit", "t2i"]
    assert said == [f"{name}: micro_batch is 64 instead of 32, a sample for each device." for name in ("edit", "t2i")]


@needs_libtpu
def test_slices_that_a_network_joins():
    config = recipe("kontext", "tiny", **{"parallel.slices": 2, "parallel.preset": "fsdp", "schedule": ("kontext",)})
    topology = read_topology("v5e:2x2", 2)
    assert (str(topology), topology.count) == ("2 x v5e:2x2", 8)
    assert [str(other) for other in topology.larger()][:2] == ["2 x v5e:2x2", "2 x v5e:2x4"]
    mesh = topology.mesh(config.parallel)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert [{device.slice_index for device in group.flat} for group in mesh.devices] == [{0}, {1}]
    (step,) = plan.plan(config, topology, only=lambda planned, program: "t2i" in program.name).costs["kontext"]
    # Gradients, of which a chip has a quarter, go from one to the other; nothing else does.
    trained = step.optimizer / 3
    assert 0.8 * trained < step.collectives["from other slices"] < 1.5 * trained
    with pytest.raises(
        ConfigError, match=r"config\.parallel\.slices is 2 and the topology is v5e:2x2; make them equal"
    ):
        plan.plan(config, read_topology("v5e:2x2"))


def test_a_program_that_a_newer_compiler_made():
    lowered = mock.Mock(**{"as_text.return_value": "program"})
    lowered.compile().as_text.side_effect = jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")
    traced = mock.Mock(**{"lower.return_value": lowered, "jaxpr.jaxpr.eqns": []})
    with pytest.raises(ConfigError, match=r"cannot read a program that libtpu .* pip install 'jax\[tpu\]=="):
        plan.compile_program(traced, mock.Mock(), read_topology("v5p:2x2x1"), plan.Cache(None), print)


def test_a_stage_without_a_plan():
    with pytest.raises(ConfigError, match="is of kind 'vlm', which cannot be planned"):
        plan.plan(recipe("tiny_vlm"), read_topology("gpu:1xh100"), count=True)


def test_the_command(tmp_path):
    tiny = ("--config=configs/kontext.py:tiny", "--config.schedule=('kontext',)", "--config.parallel.preset=fsdp")
    flags = "--topology=gpu:2xh100,gpu:8xh200", "--markdown", "--count", f"--cache={tmp_path}"
    code, out, error = command(*tiny, *flags)
    assert code == 0, error
    assert out.count("| **a step, on the average** |") == 2 and out.count("The smallest slice that fits: gpu:1x") == 2
    assert "    python -m launch.plan --config=configs/kontext.py:tiny" in out and "--topology=gpu:8xh200" in out
    assert "--all_shapes plans the others too" in error
    for topology, sentence in {"v7:2x2": "is unknown", "v5p:2x2x1": "The compiler for v5p:2x2x1 is missing"}.items():
        if importlib.util.find_spec("libtpu") is None or topology.startswith("v7"):
            code, out, error = command(*tiny, f"--topology={topology}")
            lines = [line for line in error.splitlines() if line]
            assert (code, out, len(lines)) == (1, "", 1) and sentence in lines[0]


@needs_libtpu
def test_a_tiny_step_compiled_for_a_tpu(tmp_path):
    config = recipe("kontext", "tiny", **{"parallel.preset": "fsdp", "schedule": ("kontext",)})
    only = lambda planned, program: "t2i" in program.name
    said = []
    options = {"cache": plan.Cache(tmp_path), "log": said.append, "only": only}
    topology = read_topology("v5e:2x2")
    (first,) = plan.plan(config, topology, **options).costs["kontext"]
    (again,) = plan.plan(config, topology, **options).costs["kontext"]
    assert first == again and "compiled in" in said[0] and "kept from before" in said[1]
    (counted,) = plan.plan(config, read_topology("gpu:4xh100"), only=only, count=True).costs["kontext"]
    exact = ("parameters", "optimizer", "batch", "flops", "model_flops", "calls")
    assert [getattr(first, name) for name in exact] == [getattr(counted, name) for name in exact]
    assert first.collectives["all-gather"] > 0


@needs_libtpu
def test_stages_of_reinforcement_are_built_for_a_tpu():
    config, topology = recipe("pdtr", "tiny,smoke", **{"parallel.preset": "fsdp"}), read_topology("v5e:2x2")
    planned = plan.plan(config, topology, only=lambda planned, program: False).stages
    names = {stage.name: [program.name for program in stage.programs] for stage in planned}
    assert names == {stage: ["encode", "rollout", "decode", "update"] for stage in ("edit", "t2i")}
    with jax.set_mesh(topology.mesh(config.parallel)):
        update = planned[0].programs[-1]
        assert update.function.trace(*update.arguments, **update.keywords).jaxpr


@needs_libtpu
@pytest.mark.parametrize("name", ["v6e:8x8", "v5e:8x8", "v5p:4x4x4"])
def test_any_sizes_that_come_out_even_lie_on_a_torus(name):
    config = recipe("kontext", "tiny", **{"parallel.preset": "fsdp", "parallel.data": 4})
    assert read_topology(name).mesh(config.parallel).shape["fsdp"] == 16


@needs_libtpu
def test_a_topology_that_libtpu_does_not_know():
    with pytest.raises(ConfigError, match="libtpu does not know the topology v5e:3x5"):
        plan.plan(recipe("kontext", "tiny"), read_topology("v5e:3x5"))


@needs_cuda
def test_a_tiny_step_compiled_for_two_nodes_of_gpus(tmp_path):
    changes = {"parallel.preset": "fsdp", "parallel.data": 2, "schedule": ("kontext",), "precision": "mixed"}
    config, topology, said = recipe("kontext", "tiny", **changes), read_topology("gpu:16xh100"), []
    only = lambda planned, program: "t2i" in program.name
    options = {"cache": plan.Cache(tmp_path), "log": said.append, "only": only}
    made = plan.plan(config, topology, **options)
    (first,), (again,) = made.costs["kontext"], plan.plan(config, topology, **options).costs["kontext"]
    assert first == again and any("compiled in" in line for line in said) and said[-1].endswith("kept from before")
    (counted,) = plan.plan(config, topology, only=only, count=True).costs["kontext"]
    exact = ("parameters", "optimizer", "model_flops", "calls")
    assert [getattr(first, name) for name in exact] == [getattr(counted, name) for name in exact]
    # Parts are gathered in a node but for T5's, gradients cross between them, and attention is cuDNN's.
    assert first.collectives["all-gather"] > 0 and first.collectives["all-gather between nodes"] > 0
    assert first.collectives["all-reduce between nodes"] > 0 and first.ports > 0
    assert {call.implementation for call in made.attention["kontext"] if call.network == "MMDiT"} == {"cudnn"}
    assert first.kernels["__cudnn$fmhaSoftmax"] and first.kernels["__cudnn$fmhaSoftmaxBackward"]


@needs_cuda
def test_a_target_that_the_plugin_does_not_know(tmp_path, monkeypatch):
    (tmp_path / "h100.txtpb").write_text("gpu_device_info { unheard_of: 1 }")
    monkeypatch.setattr("unipic2_jax.perf.topology.TARGETS", tmp_path)
    with pytest.raises(ConfigError, match=r"CUDA plugin .* does not know the target h100 .* plan for another chip"):
        read_topology("gpu:8xh100").mesh(recipe("kontext", "tiny").parallel)


@pytest.mark.slow
@needs_libtpu
def test_a_full_recipe_compiled_for_a_tpu(tmp_path):
    # As in docs/scaling.md: split over all 64 chips, libtpu gathers by all-reduces.
    config = recipe("kontext", **{"parallel.preset": "fsdp", "parallel.data": 4})
    costs = plan.plan(config, read_topology("v5p:4x4x4"), cache=plan.Cache(tmp_path)).costs["kontext"]
    assert all(c.moved and plan_report.fits(c, read_topology("v5p:4x4x4")) for c in costs)
    assert {"all-gather"} < set(costs[0].collectives)


@pytest.mark.slow
def test_a_full_recipe_by_arithmetic():
    config = recipe("kontext", **{"parallel.preset": "fsdp"})
    costs = plan.plan(config, GPUS, count=True).costs["kontext"]
    assert [c.name for c in costs] == ["step, edit 1024x1024 + 1 reference(s)", "step, t2i 1024x1024"]
    assert all(plan_report.fits(c, GPUS) and c.seconds(GPUS) > 0 for c in costs)
    # 2.2 billion parameters with two moments and an average, in float32, on eight chips.
    assert 8 * costs[0].optimizer == pytest.approx(3 * 2.24e9 * 4, rel=0.1)


def test_what_is_kept_does_not_depend_on_the_process(tmp_path):
    """A kernel with a rule of its own stands in the text as an address; what it is asked for has to tell programs apart."""
    machine, said = read_topology("v5p:2x2x1"), []

    def planned(address, scale):
        text = f'custom_call @CustomSPMDPartitioning {{backend_config = "{address}"}}'
        lowered = mock.Mock(**{"as_text.return_value": text})
        lowered.compile().as_text.return_value = "ENTRY %main () -> f32[] {\n}"
        for size in ("argument", "output", "alias", "temp", "generated_code"):
            setattr(lowered.compile().memory_analysis(), f"{size}_size_in_bytes", 0)
        call = mock.Mock(params={"scale": scale}, **{"primitive.name": "dot_product_attention_fwd_wrapper"})
        traced = mock.Mock(**{"lower.return_value": lowered, "jaxpr.jaxpr.eqns": [call]})
        plan.compile_program(traced, mock.Mock(), machine, plan.Cache(tmp_path), said.append)

    for address, scale in ((1234, 0.125), (5678, 0.125), (5678, 0.25)):
        planned(address, scale)
    assert ["kept" in sentence for sentence in said] == [False, True, False]


def test_the_networks_of_a_reward_are_planned_under_any_name():
    """A reward is known by its kind, whatever a recipe calls it."""
    changes = {"schedule": ("edit",), "stages.edit.rewards": {"ours": {"kind": "editreward", "model": "nowhere"}}}
    names = [cost.name for cost in plan.plan(recipe("pdtr", "tiny", **changes), GPUS, count=True).costs["edit"]]
    assert "reward (a Qwen2.5-VL)" in names
