"""`launch.bench`: what it prints, what it counts, and that it refuses to compare unequal work."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from unipic2_jax.models.sd3.flops import forward_flops
from unipic2_jax.perf import bench, bench_pictures, bench_settings
from unipic2_jax.perf.topology import CHIPS, find_chip

ROOT = Path(__file__).parents[2]
SMALL = ("size=tiny", "height=32", "width=48", "batch=2", "text_tokens=5", "num_steps=2", "repeats=1", "threads=1")
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "peft"))


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "launch.bench", *(f"--{a}" for a in arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)


def rows(text):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return cells[0], {row[0]: [float(cell) for cell in row[1:]] for row in cells[2:]}


def check_ratios(done, works):
    assert done.returncode == 0, done.stderr
    head, found = rows(done.stdout)
    assert list(found) == works and head[-1] == "PyTorch / JAX" and "MFU" not in head, "a CPU has no known peak"
    for _, ours, _, theirs, _, ratio in found.values():
        assert ratio == pytest.approx(theirs / ours, abs=0.01, rel=0.01)


@pytest.mark.skipif(not HAS_TORCH, reason="ratios need PyTorch, diffusers and peft")
def test_prints_ratios_to_pytorch_of_equal_work():
    check_ratios(run(*SMALL, "works=forward,flow"), ["forward", "flow"])


@pytest.mark.skipif(not HAS_TORCH, reason="ratios need PyTorch, diffusers and peft")
def test_whole_pictures_equal_diffusers():
    from unipic2_jax.perf.bench_pictures_torch import Theirs

    settings = bench_settings.Settings(
        size="tiny", height=32, width=48, batch=2, num_steps=3, guidance_scale=3.5, works=("t2i", "edit")
    )
    seen = {}
    theirs = lambda *given: Theirs(*given, device="cpu")
    keep = lambda work, outputs, tolerance: seen.update({work: outputs["JAX"]["pictures"]})
    for row in bench_pictures.measure(settings, theirs, 1):  # refuses pictures that differ
        assert set(row.seconds) == {"JAX", "diffusers"} and row.flops > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "compare", keep)
        list(bench_pictures.measure(settings, None, 1))
    # The comparison would mean nothing for pictures that are all alike.
    drawn, edited = seen["t2i"], seen["edit"]
    assert drawn.shape == (2, 32, 48, 3) and drawn.std() > 0.02 and np.abs(drawn[0] - drawn[1]).max() > 0.02
    assert np.linalg.norm(drawn - edited) / np.linalg.norm(drawn) > 2 * bench.TOLERANCE["float32"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="ratios need PyTorch, diffusers and peft")
@pytest.mark.parametrize(
    "more", [(), ("references=0", "guidance=2", "remat=full", "micro_batch=1"), ("references=2", "dtype=bfloat16")]
)
def test_every_work_under_every_setting_equals_pytorch(more):
    check_ratios(run(*SMALL, *more), list(bench_settings.WORKS))


def test_without_pytorch_ours_stands_alone_and_flops_are_the_models():
    done = run(*SMALL, "works=flow,rollout", "notorch")
    assert done.returncode == 0 and "JAX alone" in done.stdout, done.stderr
    _, found = rows(done.stdout)
    assert set(found) == {"flow", "rollout"} and all(len(row) == 3 for row in found.values())
    forward = forward_flops(bench_settings.TRANSFORMERS["tiny"], 6, 5, 6)
    for work, evaluations in {"flow": 2 * 3, "rollout": 2 * 2}.items():
        assert found[work][0] == pytest.approx(evaluations * forward / 1e12, rel=1e-3)


def test_flops_of_guidance_reference_policy_and_product():
    plain, guided = bench_settings.Settings(), bench_settings.Settings(guidance_scale=3.5)
    forward = plain.flops()["forward"]
    assert forward == 4 * forward_flops(bench_settings.MID, 256, 154, 256)
    # Two of three steps are trained; each is a pass of the reference, and two passes' worth of the policy's own.
    assert plain.flops()["update"] == 2 * 3 * forward and plain.flops()["rollout"] == 3 * forward
    assert all(guided.flops()[work] == 2 * plain.flops()[work] for work in ("rollout", "update"))
    assert plain.flops()["product"] == 2 * (4 * 512) * 768 * (4 * 768)


def test_unequal_work_is_refused_and_the_table_knows_the_peak():
    side = lambda name, loss: SimpleNamespace(name=name, runner=lambda work: lambda: {"loss": np.float32(loss)})
    settings = bench_settings.Settings(works=("flow",))
    (row,) = bench.measure(settings, [side("JAX", 1.0), side("PyTorch", 1.0005)], repeats=1)
    assert set(row.seconds) == {"JAX", "PyTorch"}
    for wrong in (1.01, np.nan):
        with pytest.raises(ValueError, match="'flow' differs between JAX and PyTorch"):
            next(bench.measure(settings, [side("JAX", wrong), side("PyTorch", 1.0)], repeats=1))
    chip = CHIPS["h200"]
    row = bench.Row("flow", int(chip.flops), {"JAX": 2.0, "PyTorch": 3.0})
    assert re.findall(r"[\d.]+%|[\d.]+ \|$", bench.line(row, chip)) == ["50.0%", "33.3%", "1.50 |"]
    assert bench.heading(["JAX", "PyTorch"], chip).splitlines()[0].count("MFU") == 2


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "h200")],
)
def test_devices_find_their_data_sheets(kind, name):
    assert find_chip(SimpleNamespace(device_kind=kind)) is CHIPS[name]
    assert find_chip(SimpleNamespace(device_kind="cpu")) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": "huge"}, "no size 'huge'; choose one of mid"),
        ({"height": 250}, "height is 250; 'mid' takes multiples of 16 up to 1024"),
        ({"size": "tiny", "height": 48, "width": 112}, "width is 112; 'tiny' takes multiples of 16 up to 96"),
        ({"micro_batch": 3}, "micro_batch is 3; it must divide the batch of 4"),
        ({"num_steps": 1}, "num_steps is 1; it must be at least 2"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"works": ("sleep",)}, "no work 'sleep'; choose from product"),
    ],
)
def test_impossible_settings_are_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        bench_settings.Settings(**change)


def test_the_command_says_it_without_a_traceback():
    done = run("size=huge")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: There is no size 'huge'")
    assert "Traceback" not in done.stderr
