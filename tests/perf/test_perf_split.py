"""How devices share the work: splits priced by arithmetic, the one that is taken, and what crosses between nodes."""

import dataclasses
import importlib
from unittest import mock

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.parallel.mesh import AXES, make_mesh
from unipic2_jax.perf import plan, plan_check, plan_report, split
from unipic2_jax.perf.hlo import Module
from unipic2_jax.perf.topology import GPUS, NETWORK, NODE, TARGETS, has_compiler, of_devices, read_topology
from unipic2_jax.training import setup
from unipic2_jax.training.config import validate
from unipic2_jax.training.stage import stage_class

ONE, TWO = read_topology("gpu:8xh100"), read_topology("gpu:16xh100")


def recipe(name, arg="", **changes):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config.update_from_flattened_dict(changes)
    return validate(config)


@pytest.fixture(scope="module")
def found():
    fields = {"num_prompts": 16, "grpo.micro_batch": 32, "grpo.num_steps": 2, "grpo.window.size": 0}
    config = recipe("pdtr", "tiny,t2i=none", **{f"stages.edit.{name}": value for name, value in fields.items()})
    return config, split.priced(config, TWO)


def test_splits_of_two_nodes(found):
    _, splits = found
    assert {(s.parallel.data, s.parallel.fsdp) for s in splits} == {(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)}
    assert all(s.parallel.data * s.parallel.fsdp == 16 for s in splits)
    by = {(s.parallel.fsdp, s.parallel.gather): s for s in splits}
    # Gathered once, frozen weights are received once and read from memory as if there had been no parts.
    received = lambda s, program: next(c for c in s.plan.costs["edit"] if c.name == program).collectives
    once, often = (received(by[8, gather], "update")["all-gather"] for gather in ("update", "layer"))
    assert 3 * once < often
    assert by[16, "update"].resident < by[8, "update"].resident < by[1, "update"].resident < by[1, "update"].peak
    # Copies inside of a node have nothing but gradients between nodes.
    assert "all-gather between nodes" in received(by[16, "update"], "update")
    assert set(received(by[8, "update"], "update")) >= {"all-gather", "all-reduce between nodes"}
    text = list(split.table(splits, TWO))
    assert len(text) == 2 + len(splits) and len({line.count("|") for line in text}) == 1
    assert "frozen weights gathered once an update" in "\n".join(text)


def test_what_is_fast_enough_stays_inside_of_a_node(found):
    _, splits = found
    said = []
    chosen = split.chosen(splits, said.append).parallel
    assert chosen.fsdp <= NODE and (chosen.preset, chosen.gather) == ("fsdp", "update")
    (sentence,) = said
    assert sentence.startswith("parallel.preset=auto: ") and "rather than" in sentence
    near = [s for s in splits if s.seconds <= 1.01 * min(other.seconds for other in splits)]
    assert splits[0] in near and splits[0].peak == min(s.peak for s in near if s.parallel.fsdp <= NODE)


def test_memory_decides_first(found, monkeypatch):
    _, splits = found
    smallest = min(s.peak for s in splits)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", str(1.001 * smallest / TWO.chip.memory))
    again = split._ordered([dataclasses.replace(s, memory=TWO.memory) for s in splits])
    assert [s.fits for s in again] == sorted((s.fits for s in again), reverse=True)
    assert again[0].peak == smallest and not again[-1].fits and "does not fit" in again[-1].figures()
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", str(0.5 * smallest / TWO.chip.memory))
    none = [dataclasses.replace(s, memory=TWO.memory) for s in splits]
    with pytest.raises(ConfigError, match=r"No split of this recipe fits .* GB a chip, the smallest needs"):
        split.chosen(split._ordered(none), print)


def test_parts_of_a_batch_are_searched():
    config = recipe("kontext", "tiny", schedule=("kontext",), **{"stages.kontext.batch_size": 16})
    splits = split.searched(config, ONE)
    accumulations = {s.parts["stages.kontext.accumulation"] for s in splits}
    assert accumulations == {2, 1}  # 1 and 2 samples a chip; 4 would be more than there are
    assert all(not s.reinforces and "gathered" not in str(s) for s in splits)
    best = min(splits, key=lambda s: s.seconds)
    assert splits[0].seconds <= 1.01 * best.seconds
    # In more parts, weights and their gradients are passed more often.
    own = [s for s in splits if s.parallel.fsdp == 8]
    moved = {s.parts["stages.kontext.accumulation"]: s.plan.costs["kontext"][0].moved for s in own}
    assert moved[1] < moved[2]


def test_the_plan_chooses_how_a_batch_is_computed(monkeypatch):
    """As much at once, and as much kept, as the memory allows; fields that a recipe sets stay, and so does every number of a batch."""
    auto = {"stages.kontext.remat": "auto", "stages.kontext.batch_size": 64}
    make = lambda **fields: recipe("kontext", "tiny", schedule=("kontext",), **{**auto, **fields})

    def peak(remat, parts):
        config = make(
            **{"stages.kontext.remat": remat, "stages.kontext.accumulation": parts, "parallel.preset": "fsdp"}
        )
        return max(cost.peak for cost in plan.counted(config, ONE, [config.parallel])[0].costs["kontext"])

    said = []
    for best in (("dots", 1), ("dots", 4)):
        room = 1.01 * peak(*best) / split.ROOM
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", str(room / ONE.chip.memory))
        config = make(**{"stages.kontext.accumulation": 0, "parallel.preset": "fsdp"})
        stage = split.settled(config, ONE, said.append).stages.kontext
        assert (stage.remat, stage.accumulation, stage.batch_size) == (*best, 64)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", str(0.5 * peak("full", 8) / ONE.chip.memory))
    assert split.settled(config, ONE, said.append).stages.kontext.remat == "full" and "not even one sample" in said[-1]
    assert any("kontext: remat is 'dots', 8 samples a chip at once" in sentence for sentence in said)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    given = make(**{"stages.kontext.accumulation": 2})
    assert split.settled(given, ONE, print).stages.kontext.accumulation == 2
    lost = recipe("kontext", "tiny", schedule=("kontext",), **{"stages.kontext.accumulation": 0})
    with pytest.raises(ConfigError, match="accumulation is 0, which leaves it to the plan"):
        stage_class("flow").check(lost.stages.kontext, make_mesh(jax.devices()[:1]))


def test_auto_on_what_there_is(monkeypatch):
    config = recipe("pdtr")
    assert config.parallel.preset == "auto" and recipe("pdtr", "tiny").parallel.preset == "ddp"
    for name in plan_check.RECIPES:
        assert recipe(name).parallel.preset == "auto"
    alone = setup.settled(config, None)  # CPUs have no data sheet
    assert alone.parallel.preset == "ddp" and {stage.remat for stage in alone.stages.values()} == {"full"}
    devices = [mock.Mock(platform="gpu", device_kind="NVIDIA H200", slice_index=0, spec=["slice_index"])] * 8
    assert (of_devices(devices).kind, of_devices(devices).count) == ("h200", 8)
    devices = [mock.Mock(platform="gpu", device_kind="NVIDIA L40S")] * 8
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    with pytest.raises(ConfigError, match="'auto', which nothing was given to choose with"):
        setup.settled(config, None)
    with pytest.raises(
        ConfigError, match=r"no data sheet of a NVIDIA L40S, .* choose one: --config.parallel.preset=fsdp"
    ):
        split.resolved(config, print)
    # With a split by name such a device can be used: what the plan would have chosen takes little memory.
    said = []
    small = split.resolved(recipe("pdtr", **{"parallel.preset": "fsdp"}), said.append).stages
    assert {(s.remat, s.grpo.micro_batch) for s in small.values()} == {("full", 4)}
    assert len(said) == 1 and "no data sheet of a NVIDIA L40S" in said[0]
    tokens = recipe("kontext", **{"parallel.preset": "fsdp_sp"})
    assert split.settled(tokens, ONE, said.append).stages.kontext.remat == "full" and "are counted" in said[-1]
    with pytest.raises(ConfigError, match=r"config.parallel.gather is 'never'; use one of update, layer\."):
        recipe("pdtr", **{"parallel.gather": "never"})


def test_what_crosses_between_nodes():
    mesh = lambda *sizes: AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)
    assert TWO.crossing(mesh(2, 8, 1, 1), ("fsdp",)) == 0 and TWO.crossing(mesh(2, 8, 1, 1), ("data",)) == 1
    assert TWO.crossing(mesh(1, 16, 1, 1), ("fsdp",)) == 8 and TWO.crossing(mesh(4, 4, 1, 1), ("data",)) == 2
    assert ONE.crossing(mesh(1, 8, 1, 1), ("fsdp",)) == 0


PROGRAM = """HloModule jit_run, is_scheduled=true

ENTRY %main (p: f32[64]) -> f32[128] {
  %p = f32[64]{0} parameter(0)
  %whole = f32[512]{0} all-gather(%p), channel_id=1, replica_groups=[2,8]<=[16], dimensions={0}
  %pair = f32[128]{0} all-gather(%p), channel_id=2, replica_groups=[8,2]<=[2,8]T(1,0), dimensions={0}
  %listed = f32[64]{0} all-reduce(%p), channel_id=3, replica_groups={{0,8},{1,9}}, to_apply=%add
  %all = f32[64]{0} all-reduce(%p), channel_id=4, replica_groups=[1,16]<=[16], to_apply=%add
  %moved = f32[64]{0} collective-permute(%p), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %attention = (bf16[8]{0}, u8[0]{0}) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %out = f32[128]{0} copy(%pair)
}
"""


def test_groups_of_collectives_are_read():
    module, nodes = Module.read(PROGRAM), [0] * 8 + [1] * 8
    assert module.collective_bytes() == {"all-gather": 2560, "all-reduce": 1024, "collective-permute": 256}
    assert module.collective_bytes(nodes) == {
        "all-gather": 2048,
        "all-gather between nodes": 512,
        "all-reduce between nodes": 1024,
        "collective-permute": 256,
    }
    # A pair has one port each; of sixteen the eight of a node share what crosses.
    assert module.port_bytes(nodes) == 512 + 512 + 512 / 8 and module.port_bytes([0] * 16) == 0
    assert module.kernels() == {"__cudnn$fmhaSoftmax": 1}


def test_links_are_priced_where_they_are():
    fields = dict.fromkeys(("parameters", "optimizer", "batch", "results", "activations", "single", "moved"), 0.0)
    cost = plan.Cost("s", "p", 1.0, flops=0.0, model_flops=0.0, collectives={"all-gather": 450e9}, **fields)
    assert cost.seconds(ONE) == 1.0 and plan_report.bound(cost, ONE) == "links"
    between = {"all-gather": 450e9, "all-reduce between nodes": 800e9}
    cost = plan.Cost("s", "p", 1.0, flops=0.0, model_flops=0.0, collectives=between, ports=NETWORK, **fields)
    assert cost.seconds(TWO) == 2.0


def test_targets_are_those_of_the_data_sheets():
    for kind in GPUS:
        text = (TARGETS / f"{kind}.txtpb").read_text()
        chip = read_topology(f"gpu:1x{kind}").chip
        assert f"device_memory_size: {chip.memory}\n" in text
        assert kind.upper() in text.splitlines()[0]


def test_without_the_compiler_it_is_said():
    with mock.patch("unipic2_jax.perf.topology._cuda_plugin", return_value=None):
        assert not has_compiler(ONE)
        with pytest.raises(ConfigError, match=r"pip install -r requirements-cuda.txt"):
            plan_check.machines()
        with pytest.raises(ConfigError, match=r"pip install -r requirements-cuda.txt"):
            ONE.mesh(recipe("kontext", "tiny").parallel)


def test_the_page_keeps_what_was_not_made_anew(tmp_path):
    page, tables = tmp_path / "scaling.md", tmp_path / "tables.md"
    page.write_text(f"before\n{plan_check.BEGIN}\n{plan_check.END}\nafter\n")
    unit = lambda recipe, machine, text: plan_check.Checked(
        recipe, machine, f"| {recipe} | {machine} | {text} |", f"## {recipe} on {machine}\n\n{text}\n"
    )
    first = [unit("pdtr", "gpu:8xh200", "old"), unit("pdtr", "gpu:8xh100", "kept")]
    plan_check.document(first, page, tables, lambda: "| split | parts |\nbounds")
    plan_check.document([unit("pdtr", "gpu:8xh200", "new"), unit("kontext", "gpu:8xh100", "more")], page, tables, str)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and "bounds" not in lines
    assert [line for line in lines if "gpu:" in line] == [
        "| kontext | gpu:8xh100 | more |",
        "| pdtr | gpu:8xh100 | kept |",
        "| pdtr | gpu:8xh200 | new |",
    ]
    text = tables.read_text()
    assert [text.count(word) for word in ("kept", "new", "more", "old")] == [1, 1, 1, 0]
    assert text.index("kontext on gpu:8xh100") < text.index("pdtr on gpu:8xh100") < text.index("pdtr on gpu:8xh200")
