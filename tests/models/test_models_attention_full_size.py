"""Every attention call of the full-size recipes is one that cuDNN's kernel, or ours, takes: asked without a GPU."""

import importlib
from unittest import mock

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from unipic2_jax.models import attention
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.perf import described
from unipic2_jax.training.config import unplanned, validate


def traced(name, arg, devices, *programs):
    """The attention calls of a recipe's programs for one chip's rows, as JAX traces them for a GPU: its rules of shapes are
    asked, also those of gradients."""
    config = unplanned(validate(importlib.import_module(f"configs.{name}").get_config(arg)))
    mesh = make_mesh(jax.devices()[:1], "fsdp")
    platform = mock.patch.object(attention, "platform", return_value="gpu")
    version = mock.patch.object(cudnn, "check_cudnn_version", return_value=91000)
    with jax.set_mesh(mesh), platform, version, attention.recorded() as calls:
        for planned in described.stages(config, mesh, shards=devices):
            for program in planned.programs:
                if program.name.startswith(programs):
                    program.function.trace(*program.arguments, **program.keywords)
    return {(call.network, call.queries, call.keys): call for call in calls}


@pytest.mark.parametrize(
    "name, arg, lengths",
    [
        ("kontext", "", (77 + 256 + 4096, 77 + 256 + 2 * 4096)),
        ("pdtr", "t2i=none", (77 + 256 + 2 * 1024,)),
        ("pdtr", "edit=none", (77 + 256 + 1024,)),
        ("unified", "", (256 + 4096, 256 + 2 * 4096)),
    ],
)
def test_full_size_programs_have_kernels(name, arg, lengths):
    calls = traced(name, arg, 8, "encode", "update", "step", "reward")
    even = {length + length % 2 for length in lengths}  # the text is longer by a token that nothing sees
    assert {keys for network, _, keys in calls if network == "MMDiT"} >= even
    assert not any(n % 2 for network, *counts in calls if network == "MMDiT" for n in counts)
    for call in calls.values():
        if call.network == "VAE":  # its one head is wider than any kernel of cuDNN
            assert call.width == 512 or call.implementation == "cudnn"
            continue
        assert call.implementation == "cudnn", str(call)
        assert (call.reason == "padded to even lengths") == bool(call.keys % 2 or call.queries % 2)
