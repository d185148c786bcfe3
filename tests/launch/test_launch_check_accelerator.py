"""`launch.check_accelerator`: a report with every section, and what it says of a section that breaks."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from launch import check_accelerator
from unipic2_jax.models.attention import attention
from unipic2_jax.perf import accelerator
from unipic2_jax.perf import accelerator_attention as kernels
from unipic2_jax.perf.accelerator_programs import PROGRAMS, SIZE, Check

ROOT = Path(__file__).parents[2]
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "peft"))


def sections(text):
    """Title -> what stands below it."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells[2:]}


def test_every_section_has_its_figures(tmp_path):
    check = Check("tiny", batch=None, budget_s=600.0, log=lambda line: None)
    report = accelerator.Report(tmp_path / "new" / "accelerator.md")
    alone = [name for name in check_accelerator.SECTIONS if name != "pytorch"]
    assert accelerator.run(check, report, alone, "the command"), str(report)
    text = report.path.read_text()
    assert text == str(report) and "    the command" in text and "Nothing failed." in text
    found = sections(text)
    assert list(found) == [accelerator.SECTIONS[name][0] for name in alone]

    assert jax.__version__ in rows(found["The machine"])["packages"][0]
    # The joint attention of a picture and its text, of an edit, and the image's alone.
    for shape in ("4 x 31 x 31", "4 x 40 x 40", "4 x 9 x 9"):
        assert re.search(rf"{shape}, 4 heads of 32.* \| xla \|", found["Which attention runs"])

    errors = rows(found["Attention: the kernel against XLA"])
    assert {"T5, text to image", "VAE, there and back", "MMDiT, edit", "Qwen2.5-VL vision, edit"} <= set(errors)
    for cells in errors.values():
        assert 1e-4 < float(cells[1]) < kernels.TOLERANCE and float(cells[3]) > 0
    ratios = {name: float(cells[0]) for name, cells in rows(found["Ratios on-policy"]).items()}
    assert ratios["ratio_min"] == ratios["ratio_max"] == 1 and ratios["clip_fraction"] == ratios["non_finite"] == 0
    speeds = rows(found["Seconds and memory"])
    assert tuple(speeds) == PROGRAMS
    for cells in speeds.values():
        seconds, flops, speed = map(float, cells[:3])
        assert speed == pytest.approx(flops / seconds, rel=0.02) and float(cells[5]) > 0 and float(cells[6]) > 0


@pytest.mark.slow
def test_beside_pytorch(tmp_path):
    check = Check("tiny", batch=None, budget_s=600.0, log=lambda line: None)
    report = accelerator.Report(tmp_path / "accelerator.md")
    assert accelerator.run(check, report, ["pytorch"], "the command"), str(report)
    if HAS_TORCH:
        assert {"forward", "update", "rollout", "flow"} == set(rows(str(report)))
    else:
        assert "cannot be imported" in str(report)


def test_a_section_that_breaks_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(check):
        yield "begun"
        raise RuntimeError("the plug\nwas pulled")

    monkeypatch.setitem(accelerator.SECTIONS, "kernels", ("Broken", broken))
    check = Check("tiny", None, 600.0, lambda line: None)
    report = accelerator.Report(tmp_path / "report.md")
    assert not accelerator.run(check, report, ("kernels", "machine"), "")
    found = sections(report.path.read_text())
    assert "begun\n\n**Broken failed**: RuntimeError: the plug was pulled" in found["Broken"]
    assert "packages" in found["The machine"] and "Failed: Broken." in found["The machine"]


def test_without_time_nothing_is_begun(tmp_path):
    report = accelerator.Report(tmp_path / "report.md")
    assert accelerator.run(Check("tiny", None, 0.0, lambda line: None), report, check_accelerator.SECTIONS, "")
    assert str(report).count("Left out: there was no time.") == len(check_accelerator.SECTIONS)


def test_a_kernel_that_is_wrong_is_a_failure(tmp_path, monkeypatch):
    describe = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    operands = {"query": describe(1, 5, 2, 8), "key": describe(1, 7, 2, 8), "mask": describe(1, 1, 1, 7), "bias": None}
    call = kernels.Call("network", 2, 8, 5, 7, "xla", None, operands)
    monkeypatch.setattr(accelerator, "_cases", lambda check: [kernels.Case("test", call, True)])
    single = lambda *args, **keywords: attention(*args, **keywords) * (1.05 if args[0].dtype == jnp.bfloat16 else 1)
    monkeypatch.setattr(kernels, "attention", single)
    check = Check("tiny", None, 600.0, lambda line: None)
    assert not accelerator.run(check, accelerator.Report(tmp_path / "report.md"), ("attention",), "")
    assert check.failures == ["attention by xla of network, test, 1 x 5 x 7, 2 heads of 8, mask [1, 1, 1, 7]"]


def test_full_size_programs_trace():
    check = Check("full", None, 600.0, lambda line: None)
    assert check.settings is SIZE["full"].settings
    inputs = jax.eval_shape(lambda: accelerator.bench.make_inputs(check.settings))
    ours = accelerator.bench.Ours(check.settings, inputs)
    check.__dict__.update(inputs=inputs, ours=ours)
    for name in ("forward", "edit"):
        work = check.work(name)
        made = jax.eval_shape(work.function, *jax.eval_shape(work.arguments, inputs))
        assert work.read(made).popitem()[1].shape == {"forward": (8, 64, 64, 16), "edit": (1, 512, 512, 3)}[name]
    # A forward pass of 1357 tokens; an edit is a hundred of 2381, and the VAE.
    assert check.flops("forward") / 8 == pytest.approx(2.4e12, rel=0.05)
    assert 180 < check.flops("edit") / (check.flops("forward") / 8) < 220


def test_the_command_writes_and_prints_the_report(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "launch.check_accelerator", "--size=tiny", f"--out={tmp_path / 'a.md'}"]
    run = lambda *more: subprocess.run([*line, *more], capture_output=True, text=True, env=environment, cwd=ROOT)
    done = run("--only=machine")
    assert done.returncode == 0 and done.stdout == (tmp_path / "a.md").read_text(), done.stderr
    assert "--size=tiny" in done.stdout and "The machine (" in done.stderr
    assert tuple(accelerator.SECTIONS) == check_accelerator.SECTIONS
    done = run("--only=weather")
    assert done.returncode == 2 and "no section 'weather'; choose from machine" in done.stderr
