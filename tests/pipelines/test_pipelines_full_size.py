"""The full-size MetaQuery model without its memory: abstract on eight devices, and 7B's files with narrow layers."""

import subprocess
import sys
import textwrap

import eight_devices
import pytest


def run(code, *arguments):
    """What a fresh process prints that sees eight devices."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=eight_devices.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


ABSTRACT = """
    import jax, jax.numpy as jnp, numpy as np
    from unipic2_jax.weights.precision import as_precision
    from unipic2_jax.models.qwen.vision import VisionInput
    from unipic2_jax.models.registry import SIZES
    from unipic2_jax.parallel.mesh import batch_sharding, make_mesh
    from unipic2_jax.parallel.rules import shardings
    from unipic2_jax.models.bundle import init_params, make_modules
    from unipic2_jax.models.qwen.processor import VLMInput

    sizes, mesh = SIZES["unipic2_metaquery"], make_mesh(preset="fsdp")
    transformer, vae, conditioner = make_modules(sizes.networks, None, sizes.settings, "mixed")
    abstract = jax.eval_shape(
        lambda key: as_precision("mixed").hold(init_params(transformer, vae, conditioner, key)), jax.random.key(0)
    )
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    params = jax.tree.map(place, abstract, shardings(mesh, abstract))
    held = lambda leaf: np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    print(whole, sum(held(leaf) for leaf in jax.tree.leaves(params)))

    # Eight edits of 512 x 512: 448 x 448 for the tower are 16 x 16 merged tokens in 4 x 4 windows.
    batch, length, tower = 8, 320, sizes.networks["vlm"].vision_config
    of = lambda shape, dtype: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=batch_sharding(mesh))
    slots = (16, tower.window_slots)
    vision = VisionInput(
        of((*slots, tower.patch_dim), np.float32), of((*slots, 2), np.int32), of(slots, np.int32), of((length,), np.int32)
    )
    tokens = VLMInput(of((length,), np.int32), of((3, length), np.int32), of((length,), bool), vision)
    options = {"xla_backend_optimization_level": 0}
    made = jax.jit(conditioner.apply).lower(params["conditioner"], tokens).compile(compiler_options=options)
    (context, pooled), memory = made.out_info, made.memory_analysis()
    assert (context.shape, pooled.shape) == ((8, 256, 4096), (8, 2048)), (context.shape, pooled.shape)
    print(memory.argument_size_in_bytes)
"""


def test_the_model_is_split_over_devices_without_being_allocated():
    whole, held, arguments = run(ABSTRACT)
    # bfloat16 for the 8.3e9 parameters of the vision-language model and the 3.5e9 of transformer, autoencoder and connector.
    assert 23e9 < whole < 24e9, whole
    # What is whole everywhere is little: the autoencoder above all.
    assert held < whole / 8 * 1.1
    # What a device of the compiled conditioner is given: its eighth of the vision-language model, and of the connector.
    assert 8.3e9 * 2 / 8 < arguments < held
    print(f"{whole / 1e9:.1f} GB in all, {held / 1e9:.2f} GB a device, {arguments / 1e9:.2f} GB for the conditioner")


STREAM = """
    import dataclasses, sys, threading
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from ml_dtypes import bfloat16
    from unipic2_jax.models.qwen.decoder import QWEN2_5_VL_7B, Qwen2_5_VL
    from unipic2_jax.parallel.mesh import make_mesh
    from unipic2_jax.parallel.rules import shardings
    from unipic2_jax.models import registry
    from unipic2_jax.models.qwen import names as qwen
    from unipic2_jax.weights import io, native, table

    tower = dataclasses.replace(
        QWEN2_5_VL_7B.vision_config, hidden_size=192, intermediate_size=384, num_heads=4, out_hidden_size=256
    )
    config = dataclasses.replace(
        QWEN2_5_VL_7B, hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2,
        mrope_section=(8, 12, 12), vision_config=tower,
    )
    folder, rules = Path(sys.argv[1]), qwen.rules(config)
    abstract = registry.NETWORKS[config.CLASS_NAME].abstract(config)
    shapes = table.expected_shapes(rules, abstract)
    assert len(shapes) == 729, len(shapes)
    rng = np.random.default_rng(0)
    draw = rng.integers(0, 1 << 14, max(int(np.prod(s)) for s in shapes.values()), np.uint16)
    made = lambda n, shape: np.roll(draw, n)[: int(np.prod(shape))].view(bfloat16).reshape(shape)
    io.write_folder(folder, "model", ((name, made(n, s)) for n, (name, s) in enumerate(shapes.items())), 32 << 20)
    mesh = make_mesh(preset="fsdp")
    placed = shardings(mesh, {"vlm": abstract})["vlm"]
    # The first use of JAX allocates what is its own; it is done before measuring.
    jax.device_put(np.ones((8, 8)), jax.tree.leaves(placed)[0]).block_until_ready()
    del draw

    def anonymous():
        return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) << 10

    peak, done, start = 0, threading.Event(), anonymous()
    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, anonymous() - start)
    threading.Thread(target=watch, daemon=True).start()
    params = native.load_component(folder, rules, abstract, placed, jnp.bfloat16)
    jax.block_until_ready(params)
    done.set()
    leaves = jax.tree.leaves(params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    source = io.open_folder(folder)
    for name in ("visual.blocks.31.attn.qkv.weight", "model.layers.27.mlp.down_proj.weight", "lm_head.weight"):
        back = dict(table.to_torch(rules, params))[name]
        assert np.array_equal(np.asarray(back).view(np.uint16), np.asarray(source[name]).view(np.uint16)), name
    files = len(list(folder.glob("model-*.safetensors")))
    print(sum(l.nbytes for l in leaves), max(l.nbytes for l in leaves), peak, files)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_loading_the_files_of_7b_streams(tmp_path):
    """All 729 names of the published files, narrow layers and the whole vocabulary, in shards of 32 MiB, onto 8 devices."""
    total, largest, peak, files = run(STREAM, tmp_path)
    print(
        f"{total / 1e6:.0f} MB in {files:.0f} files, the largest leaf {largest / 1e6:.0f} MB: peak {peak / 1e6:.0f} MB"
    )
    assert files > 3
    # The parameters themselves, and never more than the leaf that is on its way (a copy of it, and its parts).
    assert peak < total + 2.2 * largest
