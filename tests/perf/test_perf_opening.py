"""What is said before the first step, on a CPU and on accelerators that are stood in for."""

import importlib
import types

import jax
import numpy as np
import pytest

from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.perf import opening, plan
from unipic2_jax.perf.topology import GB, read_topology
from unipic2_jax.training.config import validate


def recipe(name, arg="", **changes):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config.update_from_flattened_dict(changes)
    return validate(config)


def rows(text):
    return dict(line.strip().split(None, 1) for line in text.splitlines())


def accelerators(kind, **axes):
    """A mesh of devices that are not there."""
    stats = lambda: {"bytes_limit": 63.7 * GB}
    count = int(np.prod(list(axes.values())))
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, process_index=0, memory_stats=stats)
    shape = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, **axes}
    return types.SimpleNamespace(devices=np.array([device] * count), shape=shape)


def test_on_a_cpu_it_is_short_and_nothing_is_counted(monkeypatch):
    monkeypatch.setattr(opening, "counted", None)
    found = rows(opening.table(recipe("pdtr", "tiny,smoke"), make_mesh(jax.devices()[:1]), "runs/a"))
    assert found == {
        "devices": "1 x cpu",
        "split": "one device",
        "precision": "float32",
        "edit": "2 steps of grpo; 2 x 16 samples; remat 'full'",
        "t2i": "2 steps of grpo; 2 x 16 samples; remat 'full'",
        "workdir": "runs/a: a checkpoint every 20 steps, 3 kept; report.md and export/ at the end",
    }


def test_on_accelerators_it_has_the_plans_figures(monkeypatch):
    fields = {"parallel.preset": "fsdp", "schedule": ("kontext",), "precision": "mixed"}
    config = recipe("kontext", "tiny", **fields)
    topology = read_topology("gpu:8xh100")
    (made,) = plan.counted(config, topology, [config.parallel])
    monkeypatch.setattr(opening, "counted", lambda *given: [made] if given[1].count == 8 else None)
    found = rows(opening.table(config, accelerators("NVIDIA H100 80GB HBM3", fsdp=8), "gs://b/run"))
    assert found["devices"] == "8 x NVIDIA H100 80GB HBM3, 64 GB each for programs"
    assert found["split"] == "fsdp 8"
    assert found["precision"].startswith("mixed: bfloat16 arithmetic, float32 for what is trained, bfloat16 for other")
    costs = made.costs["kontext"]
    seconds = sum(cost.calls * cost.seconds(topology) for cost in costs)
    assert f"; {seconds:.2g} s a step at least (the step, edit 48x48" in found["kontext"]
    assert " GB resident, at most " in found["kontext"]
    assert all(cost.products > 100 for cost in costs)
    minutes = max(1, round(sum(cost.products for cost in costs) * opening.COMPILE / 60))
    assert found["programs"].startswith(f"{len(costs)} to compile in about {minutes} min the first time")
    assert "(kontext step, edit" in found["programs"] and "other sizes" in found["programs"]
    assert found["workdir"].startswith("gs://b/run: ")


@pytest.mark.parametrize(
    ("kind", "axes", "reason"),
    [
        ("NVIDIA GeForce RTX 4090", {"data": 2}, "There is no data sheet of a NVIDIA GeForce RTX 4090"),
        ("NVIDIA H100 80GB HBM3", {"fsdp": 4, "tensor": 2}, "Steps on 8 x h100 are counted here"),
    ],
)
def test_what_cannot_be_counted_is_said_and_ends_nothing(kind, axes, reason):
    config = recipe("kontext", "tiny", **{"parallel.preset": "fsdp_tp" if "tensor" in axes else "ddp"})
    text = opening.table(config, accelerators(kind, **axes), "runs/a")
    assert f"not counted  {reason}" in text and "workdir" in text
