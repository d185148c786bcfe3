"""The table of parallelism: what it says of every parameter, and what it refuses."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from unipic2_jax.models.registry import NETWORKS, SIZES
from unipic2_jax.parallel.mesh import AXES, make_mesh, mesh_sizes, shard_batch
from unipic2_jax.parallel.rules import RULES, Rules, constrain, parameter_axes


def test_an_array_is_split_over_a_mesh_axis_once():
    assert RULES.spec("batch", "sequence", None) == PartitionSpec(("data", "fsdp"), "sequence", None)
    assert RULES.spec("embed", "heads") == PartitionSpec("fsdp", "tensor")
    with pytest.raises(ValueError, match="mesh axis 'fsdp' twice, for 'batch' and for 'embed'"):
        RULES.spec("batch", None, "embed")
    with pytest.raises(ValueError, match="'emded' is no logical axis; the table has batch, embed,"):
        RULES.spec("emded")
    # Another table may have other conflicts, and finds them as well.
    with pytest.raises(ValueError, match="'tensor' twice"):
        dataclasses.replace(RULES, sequence=("tensor",)).spec("batch", "sequence", "heads")
    assert {name for field in dataclasses.fields(Rules) for name in getattr(RULES, field.name)} == set(AXES)


@pytest.mark.parametrize("size", ["sd35_medium", "unipic2_metaquery"])
def test_every_large_parameter_has_a_rule(size):
    networks = SIZES[size].networks.items()
    abstract = {name: NETWORKS[config.CLASS_NAME].abstract(config) for name, config in networks}
    whole = total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name, count = jax.tree_util.keystr(path, simple=True, separator="/"), math.prod(leaf.shape)
        axes = parameter_axes(name, len(leaf.shape))
        RULES.spec(*axes)
        if "vae/" in name:
            continue
        total += count
        if not any(axes):
            whole += count
            assert count < 5e6, name
        else:
            assert {"embed", "stored", "vocabulary"} & set(axes), name  # fsdp splits it
    # Biases, norms, queries and embeddings of patches are a four-hundredth at most.
    assert whole < total / 400, whole / total


def test_axes_of_lora_and_of_optimizer_states():
    assert parameter_axes("lora/dual_blocks/attn/to_q/a", 3) == (None, "embed", None)
    assert parameter_axes("lora/last_block/attn/to_q/b", 2) == (None, "heads")
    assert parameter_axes("lora/blocks/attn/to_out/a", 3) == (None, "heads", None)
    assert parameter_axes("lora/blocks/attn/to_add_out/b", 3) == (None, None, "embed")
    kernel = "transformer/blocks/ff/linear_1/kernel"
    assert parameter_axes(kernel, 3) == parameter_axes(f"opt_state/1/0/mu/{kernel}", 3) == (None, "embed", "hidden")
    assert parameter_axes("opt_state/1/0/count", 0) == ()


def test_sizes_of_meshes():
    assert mesh_sizes(8) == [8, 1, 1, 1]
    assert mesh_sizes(8, "fsdp") == [1, 8, 1, 1]
    assert mesh_sizes(8, "fsdp_tp") == [1, 4, 2, 1]
    assert mesh_sizes(8, "fsdp_sp", {"sequence": 4}) == [1, 2, 1, 4]
    assert mesh_sizes(8, "fsdp", {"data": 2}) == [2, 4, 1, 1]
    assert mesh_sizes(16, "fsdp_tp", slices=2) == [2, 4, 2, 1]
    assert mesh_sizes(6, "ddp", {"tensor": 0}) == [6, 1, 1, 1]
    for arguments, sentence in {
        (8, "ddpp"): "'ddpp' does not exist; choose one of ddp",
        (7, "fsdp_tp"): "does not fit 7 devices",
        (8, "fsdp", ("fspd", 2)): "no axis 'fspd'",
        (8, "fsdp", ("data", 3)): "does not fit 8 devices",
    }.items():
        devices, preset, *sizes = arguments
        with pytest.raises(ValueError, match=sentence):
            mesh_sizes(devices, preset, dict(sizes))
    with pytest.raises(ValueError, match="2 slices do not divide the data axis"):
        mesh_sizes(9, "ddp", {"data": 9}, slices=2)


def test_one_device_is_left_alone():
    x = np.ones((4, 2))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        assert constrain(x, "batch", None) is x
        assert shard_batch({"x": x}, make_mesh(jax.devices()[:1]))["x"].shape == (4, 2)
