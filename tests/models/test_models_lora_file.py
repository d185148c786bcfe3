"""LoRA files: what diffusers and peft make of ours, and we of theirs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="these tests exchange LoRA files with PyTorch")
diffusers = pytest.importorskip("diffusers", reason="these tests exchange LoRA files with diffusers")
peft = pytest.importorskip("peft", reason="these tests exchange LoRA files with peft")

import tiny_diffusers  # noqa: E402

from unipic2_jax.models import convert, registry  # noqa: E402
from unipic2_jax.models.lora import count_matrices, joined, merge_lora, scaled  # noqa: E402
from unipic2_jax.models.sd3 import lora_file as lora  # noqa: E402
from unipic2_jax.models.sd3.lora import LORA_TARGETS, init_lora  # noqa: E402
from unipic2_jax.models.sd3.lora_writing import save_lora, write_lora  # noqa: E402
from unipic2_jax.models.sd3.mmdit import MMDiT  # noqa: E402
from unipic2_jax.weights import io, native, table  # noqa: E402

RANK, ALPHA = 3, 7.5
TARGETS = [f"{name}.0" if name.endswith("to_out") else name for name in LORA_TARGETS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder of a pipeline with a transformer alone, config, parameters)."""
    folder = tmp_path_factory.mktemp("model")
    tiny_diffusers.transformer(torch).save_pretrained(folder / "transformer")
    network, config = registry.read_network(folder / "transformer")
    rules, abstract = network.rules(config), network.abstract(config)
    return folder, config, native.load_component(folder / "transformer", rules, abstract)


def random_lora(params, seed=0):
    rng = np.random.default_rng(seed)
    zeros = init_lora(jax.random.key(0), params, RANK)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), zeros)


def inputs(config):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    latents, context = draw(2, 8, 8, config.in_channels), draw(2, 5, config.joint_attention_dim)
    return latents, np.array([900.0, 40.0], np.float32), context, draw(2, config.pooled_projection_dim)


@functools.partial(jax.jit, static_argnums=0)
def velocity(config, variables):
    return MMDiT(config).apply(variables, *inputs(config))


def ours(config, params, **collections):
    return np.asarray(velocity(config, {"params": params, **collections}))


def theirs(transformer, config):
    latents, timestep, context, pooled = (torch.from_numpy(x) for x in inputs(config))
    with torch.no_grad():
        out = transformer(latents.permute(0, 3, 1, 2), context, pooled, timestep, return_dict=False)[0]
    return out.permute(0, 2, 3, 1).numpy()


def pipeline(folder):
    """A real pipeline object with nothing but the transformer: `load_lora_weights` needs no more."""
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
    parts |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **parts)


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def peft_transformer(folder, alpha=ALPHA, targets=TARGETS, **fields):
    """The original with a random adapter that peft made."""
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    config = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **fields)
    torch.manual_seed(3)
    transformer.add_adapter(config)
    with torch.no_grad():
        for name, p in transformer.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.normal_(0, 0.3)
            if "magnitude" in name:
                p.mul_(1.3)
    return transformer


# Every kind of layer: both attentions, feed-forward, modulations, what comes in and what goes out.
EVERYTHING = [
    *TARGETS,
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "ff_context.net.2"),
    *("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out", "context_embedder"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.text_embedder.linear_2"),
]
MIXED = {"rank_pattern": {"transformer_blocks.1.attn.to_q": 5}, "alpha_pattern": {r"ff.net.2": 1.5}}


def merged_by_peft(transformer):
    """Layer -> its weight after peft merged its own adapter."""
    found = {}
    for name, module in transformer.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            module.merge()
            found[name] = module.base_layer.weight.detach().float().numpy()
    return found


def layers_of(transformer):
    """Layer -> (down, up, alpha) of peft's adapter."""
    get = lambda holder: holder["default"].weight.detach().numpy()
    return {
        name: (get(module.lora_A), get(module.lora_B), module.scaling["default"] * module.r["default"])
        for name, module in transformer.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def original_names(layers, config):
    """The same updates under the names of the original code, where query, key and value are one matrix and two modulations
    have scale and shift the other way round. Written without the reader's help."""
    last, found, fused = config.num_layers - 1, {}, {}
    top = {
        "proj_out": "final_layer.linear",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    }
    inside = {
        **{"attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj"},
        **{"attn2.to_out.0": "x_block.attn2.proj", "norm1.linear": "x_block.adaLN_modulation.1"},
        **{"norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1"},
        **{"ff.net.2": "x_block.mlp.fc2", "ff_context.net.2": "context_block.mlp.fc2"},
    }
    for layer, (down, up, alpha) in layers.items():
        swap = layer == "norm_out.linear" or layer == f"transformer_blocks.{last}.norm1_context.linear"
        up = np.concatenate([up[len(up) // 2 :], up[: len(up) // 2]]) if swap else up
        if layer in top:
            found[top[layer]] = down, up, alpha
            continue
        _, number, inner = layer.split(".", 2)
        block = f"joint_blocks.{number}"
        if inner in inside:
            found[f"{block}.{inside[inner]}"] = down, up, alpha
            continue
        attention, name = inner.split(".")
        stream = "context_block.attn" if name.startswith("add") else f"x_block.{attention}"
        fused.setdefault(f"{block}.{stream}.qkv", {})["qkv".index(name.split("_")[1])] = down, up, alpha
    for name, parts in fused.items():
        width, ups, start = parts[0][1].shape[0], [], 0
        rank = sum(down.shape[0] for down, _, _ in parts.values())
        for i in range(3):
            down, up, alpha = parts[i]
            wide = np.zeros((width, rank), np.float32)
            wide[:, start : start + down.shape[0]] = up * alpha / down.shape[0]
            ups.append(wide)
            start += down.shape[0]
        found[name] = np.concatenate([parts[i][0] for i in range(3)]), np.concatenate(ups), rank
    return found


def with_alphas(layers, prefix, ends=(".lora_down.weight", ".lora_up.weight"), flat=False):
    tensors = {}
    for layer, (down, up, alpha) in layers.items():
        name = prefix + (layer.replace(".", "_") if flat else layer)
        tensors |= {name + ends[0]: down, name + ends[1]: up, f"{name}.alpha": np.float32(alpha)}
    return tensors


PEFT_ENDS = (".lora_A.weight", ".lora_B.weight")
# Name of a layout -> what a tool that writes it makes of the layers.
LAYOUTS = {
    "bare peft names": lambda layers, config: with_alphas(layers, "", PEFT_ENDS),
    "peft's prefix and the adapter's name": lambda layers, config: with_alphas(
        layers, "base_model.model.transformer.", (".lora_A.default.weight", ".lora_B.default.weight")
    ),
    "transformer, lora.down": lambda layers, config: with_alphas(
        layers, "transformer.", (".lora.down.weight", ".lora.up.weight")
    ),
    "OneTrainer": lambda layers, config: with_alphas(layers, "lora_transformer_", flat=True),
    "kohya": lambda layers, config: with_alphas(original_names(layers, config), "lora_unet_", flat=True),
    "ComfyUI": lambda layers, config: with_alphas(original_names(layers, config), "diffusion_model.", PEFT_ENDS),
    "the original's names": lambda layers, config: with_alphas(
        original_names(layers, config), "model.diffusion_model.", PEFT_ENDS
    ),
}


@pytest.fixture(scope="module")
def mixed(model):
    """(the layers of an adapter with mixed ranks and alphas on every kind of layer, their weights as peft merges it)."""
    transformer = peft_transformer(model[0], targets=EVERYTHING, **MIXED)
    layers = layers_of(transformer)
    assert {down.shape[0] for down, _, _ in layers.values()} == {RANK, 5}
    assert {alpha for _, _, alpha in layers.values()} == {ALPHA, 1.5}
    return layers, merged_by_peft(transformer)


def merged_by_us(file, model, scale=1.0):
    """All weights by their torch names, the adapter in them."""
    _, config, params = model
    found = lora.leaves(lora.read_lora(file, {"transformer": config}).updates["transformer"], config, scale)
    rules = registry.NETWORKS[config.CLASS_NAME].rules(config)
    return dict(table.to_torch(rules, jax.device_get(lora.merge(params, found))))


def assert_merged(weights, wanted, model):
    """What peft adapted is what peft made of it, and all else is as it was."""
    _, config, params = model
    before = dict(table.to_torch(registry.NETWORKS[config.CLASS_NAME].rules(config), params))
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer in wanted:
            assert error(weight, wanted[layer]) <= 1e-6, layer
            assert error(weight, before[name]) > 1e-2, "the update must be large enough to be seen"
        else:
            np.testing.assert_array_equal(weight, before[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_what_peft_applies(model, mixed, tmp_path, layout):
    layers, wanted = mixed
    tensors = LAYOUTS[layout](layers, model[1])
    file = io.write_file(tmp_path / "x.safetensors", tensors.items(), {"format": "pt"})
    assert lora.is_lora_file(file)
    assert_merged(merged_by_us(file, model), wanted, model)


@pytest.mark.parametrize("layout", lora.LAYOUTS)
def test_every_layout_is_written_as_what_is_read(model, mixed, tmp_path, layout):
    """From kohya's names to diffusers' and from diffusers' to kohya's; diffusers' is what diffusers itself applies."""
    layers, wanted = mixed
    configs = {"transformer": model[1]}
    source = LAYOUTS["OneTrainer" if layout == "kohya" else "kohya"](layers, model[1])
    source = io.write_file(tmp_path / "source.safetensors", source.items(), {"format": "pt"})
    file = write_lora(tmp_path / "made.safetensors", lora.read_lora(source, configs), configs, layout)
    assert_merged(merged_by_us(file, model), wanted, model)
    if layout == "kohya":
        names = set(io.read_header(file)[0])
        assert "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight" in names
        assert not any("to_q" in name for name in names)
    else:
        pipe = pipeline(model[0])
        pipe.load_lora_weights(file)
        assert_merged(merged_by_us(file, model), merged_by_peft(pipe.transformer), model)


def test_what_is_applied_beside_the_weights_is_what_is_merged(model, mixed, tmp_path):
    """Mixed ranks in one stack, at a scale: diffusers' own picture."""
    folder, config, params = model
    file = io.write_file(tmp_path / "x.safetensors", LAYOUTS["OneTrainer"](mixed[0], config).items(), {"format": "pt"})
    tree = scaled(lora.load_lora(file, config), 0.5)
    transformer = peft_transformer(folder, targets=EVERYTHING, **MIXED)
    plain = ours(config, params)
    transformer.set_adapters("default", 0.5)
    assert error(ours(config, params, lora=tree), theirs(transformer, config)) <= 1e-4
    assert error(ours(config, merge_lora(params, tree)), theirs(transformer, config)) <= 1e-4
    assert error(plain, theirs(transformer, config)) > 1e-2
    # Two at once are the sum.
    both = joined([tree, scaled(tree, 1.0)])
    assert error(ours(config, merge_lora(params, both)), ours(config, merge_lora(params, scaled(tree, 2.0)))) <= 1e-5


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"use_dora": True}, {"use_dora": True, **MIXED}])
def test_the_other_scales_of_peft(model, tmp_path, fields):
    """rsLoRA and DoRA, in peft's folder and in diffusers' file."""
    from safetensors.torch import save_file

    folder = model[0]
    transformer = peft_transformer(folder, targets=EVERYTHING, **fields)
    state = peft.utils.get_peft_model_state_dict(transformer)
    save_file(
        {f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, tmp_path / "adapter_model.safetensors"
    )
    transformer.peft_config["default"].save_pretrained(tmp_path)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "diffusers",
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    wanted = merged_by_peft(transformer)
    for source in (tmp_path, tmp_path / "diffusers"):
        assert_merged(merged_by_us(source, model), wanted, model)
    configs = {"transformer": model[1]}
    again = write_lora(tmp_path / "again", lora.read_lora(tmp_path, configs), configs)
    assert_merged(merged_by_us(again, model), wanted, model)
    if "use_dora" in fields:
        with pytest.raises(ValueError, match="is a DoRA, which can only be merged"):
            lora.load_lora(tmp_path, model[1])


def test_a_dora_of_columns(model, tmp_path):
    """OneTrainer's: the lengths of columns instead of rows."""
    _, config, params = model
    rng = np.random.default_rng(0)
    name = "transformer_blocks.1.attn.to_q"
    weight = np.asarray(
        dict(table.to_torch(registry.NETWORKS[config.CLASS_NAME].rules(config), params))[f"{name}.weight"]
    )
    out, width = weight.shape
    down, up = rng.normal(size=(2, width)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32)
    length = rng.uniform(1, 2, size=(1, width)).astype(np.float32)
    tensors = with_alphas({name: (down, up, 1.0)}, "lora_transformer_", flat=True)
    tensors[f"lora_transformer_{name.replace('.', '_')}.dora_scale"] = length
    file = io.write_file(tmp_path / "x.safetensors", tensors.items(), {"format": "pt"})
    moved = weight + up @ down / 2
    wanted = length * moved / np.linalg.norm(moved, axis=0, keepdims=True)
    assert_merged(merged_by_us(file, model), {name: wanted}, model)
    with pytest.raises(ValueError, match="DoRA of columns"):
        configs = {"transformer": config}
        write_lora(tmp_path / "y.safetensors", lora.read_lora(file, configs), configs)


def test_text_encoders_and_the_patch_convolution_are_merged(model, tmp_path):
    """Parts for CLIP come in the same file; convolutions are of the transformer's first layer."""
    _, config, params = model
    encoder = tiny_diffusers.clip(torch, 16)
    clip_config = registry.NETWORKS["CLIPTextModelWithProjection"].config.from_dict(encoder.config.to_dict())
    rules = registry.NETWORKS["CLIPTextModelWithProjection"].rules(clip_config)
    state = {name: p.detach().numpy() for name, p in encoder.state_dict().items()}
    before = table.to_flax(rules, state, registry.NETWORKS["CLIPTextModelWithProjection"].abstract(clip_config))
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "fc1"], "init_lora_weights": False}
    encoder = peft.inject_adapter_in_model(peft.LoraConfig(**fields), encoder)
    layers = layers_of(encoder)
    rng = np.random.default_rng(0)
    width, channels = config.width, config.in_channels
    down = rng.normal(size=(2, channels, 2, 2)).astype(np.float32)
    up = rng.normal(size=(width, 2, 1, 1)).astype(np.float32)
    tensors = {"lora_unet_x_embedder_proj.lora_down.weight": down, "lora_unet_x_embedder_proj.lora_up.weight": up}
    for prefix, flat in (("lora_te1_", True), ("text_encoder.", False)):
        named = with_alphas(layers, prefix, flat=flat)
        file = io.write_file(tmp_path / "x.safetensors", {**tensors, **named}.items(), {"format": "pt"})
        configs = {"transformer": config, "text_encoder": clip_config}
        adapter = lora.read_lora(file, configs)
        found = lora.leaves(adapter.updates["text_encoder"], clip_config)
        tree, rest = lora.low_rank(found, clip_config)
        assert not tree and rest.keys() == found.keys()
        weights = dict(table.to_torch(rules, jax.device_get(lora.merge(before, rest))))
        for layer, (a, b, alpha) in layers.items():
            assert error(weights[f"{layer}.weight"], state[f"{layer}.weight"] + b @ a * alpha / 2) <= 1e-6
        tree, rest = lora.low_rank(lora.leaves(adapter.updates["transformer"], config), config)
        assert not tree and list(rest) == ["pos_embed/proj"]
        merged = dict(table.to_torch(registry.NETWORKS[config.CLASS_NAME].rules(config), lora.merge(params, rest)))
        plain = dict(table.to_torch(registry.NETWORKS[config.CLASS_NAME].rules(config), params))
        wanted = plain["pos_embed.proj.weight"] + np.einsum("or,rihw->oihw", up[..., 0, 0], down)
        assert error(merged["pos_embed.proj.weight"], wanted) <= 1e-6
        with pytest.raises(ValueError, match="this model has no text_encoder"):
            lora.read_lora(file, {"transformer": config})


def test_diffusers_applies_our_file(model, tmp_path):
    folder, config, params = model
    tree = random_lora(params)
    file = save_lora(tmp_path, tree, ALPHA, config)
    assert file.name == "pytorch_lora_weights.safetensors"
    pipe = pipeline(folder)
    plain = theirs(pipe.transformer, config)
    pipe.load_lora_weights(tmp_path)
    applied = theirs(pipe.transformer, config)
    assert error(plain, applied) > 1e-2, "the update must be large enough to be seen"
    adapted = [name for name, _ in pipe.transformer.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == count_matrices(tree) == 3 * 8 - 1
    assert error(ours(config, params, lora=scaled(tree, ALPHA / RANK)), applied) <= 1e-4
    assert error(ours(config, params, lora=lora.load_lora(file, config)), applied) <= 1e-4


def test_without_an_alpha_it_is_the_rank_as_diffusers_has_it(model, tmp_path):
    folder, _config, _params = model
    transformer = peft_transformer(folder, alpha=RANK)
    layers = peft.utils.get_peft_model_state_dict(transformer)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    assert_merged(merged_by_us(tmp_path, model), merged_by_peft(transformer), model)


def test_a_header_without_components_is_the_transformers(model, tmp_path):
    _, config, params = model
    file = save_lora(tmp_path / "a.safetensors", random_lora(params), ALPHA, config)
    bare = {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 1})}
    bare = rewrite(file, tmp_path / "b.safetensors", lambda t: None, bare)
    found, whole = (table.flatten(lora.load_lora(one, config)) for one in (bare, file))
    path = "last_block/attn/to_q/a"
    np.testing.assert_allclose(found[path] * ALPHA, whole[path], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_comes_back_bit_for_bit(model, tmp_path, dtype):
    folder, config, params = model
    file = save_lora(tmp_path / "a.safetensors", random_lora(params), ALPHA, config, dtype)
    assert {str(tensor.dtype) for tensor in io.read_header(file)[0].values()} == {dtype}
    convert.from_torch(file, tmp_path / "ours", base=folder)
    convert.to_torch(tmp_path / "ours", tmp_path / "b.safetensors")
    assert file.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_part_of_the_layers(model, tmp_path):
    """Layers of a stack that a file leaves out are zeros."""
    _folder, config, params = model
    tree = random_lora(params)
    file = save_lora(tmp_path / "a.safetensors", tree, ALPHA, config)
    keep = lambda t: [t.pop(name) for name in list(t) if "blocks.1.attn.to_q" not in name]
    part = rewrite(file, tmp_path / "b.safetensors", keep)
    found = table.flatten(lora.load_lora(part, config))
    group, index = next((g, list(r).index(1)) for g, r in config.groups.items() if 1 in r)
    assert {path.rpartition("/")[0] for path in found} == {f"{group}/attn/to_q"}
    own = found[f"{group}/attn/to_q/a"]
    np.testing.assert_allclose(
        own[index], np.asarray(tree[group]["attn"]["to_q"]["a"][index]) * ALPHA / RANK, rtol=1e-6
    )
    assert not np.delete(own, index, axis=0).any()


def rewrite(file, out, change, metadata=None):
    tensors, header = io.read_header(file)
    tensors = {name: t[...] for name, t in tensors.items()}
    change(tensors)
    return io.write_file(out, tensors.items(), header if metadata is None else metadata)


def test_sentences(model, tmp_path):
    _, config, params = model
    file = save_lora(tmp_path / "a.safetensors", random_lora(params), ALPHA, config)
    name = "transformer.transformer_blocks.1.attn.to_q.lora_A.weight"

    def complain(change, words, metadata=None):
        out = rewrite(file, tmp_path / "b.safetensors", change, metadata)
        with pytest.raises(ValueError, match=words) as error:
            lora.load_lora(out, config)
        assert str(out) in str(error.value) and "\n" not in str(error.value)

    complain(lambda t: t.pop(name), "has no 'down' matrix for the layer 'transformer_blocks.1.attn.to_q'")
    complain(lambda t: t.update({name.replace("attn", "attn9"): t[name]}), "adapts 'transformer.*attn9.to_q.*nearest")
    complain(lambda t: t.update({name.replace(".1.", ".77."): t[name]}), r"adapts '.*\.77\.attn\.to_q")
    complain(lambda t: t.update({name: np.zeros((RANK, 15), np.float32)}), r"\(3, 15\).*another size")
    complain(lambda t: t.update({name: np.zeros((RANK + 1, 16), np.float32)}), r"\(4, 16\).*another size")
    complain(lambda t: t.update({name: np.zeros((0, 16), np.float32)}), r"\(0, 16\).*another size")
    complain(lambda t: t.update({name: np.float32(1)}), "another size")
    magnitude = name.replace("lora_A.weight", "lora_magnitude_vector")
    complain(lambda t: t.update({magnitude: np.ones(15, np.float32)}), r"a magnitude of \(15,\)")
    # Nothing is taken twice, and no part of a DoRA is left out in silence.
    complain(lambda t: t.update({name.removeprefix("transformer."): t[name]}), "a second time, under another name")
    fused = "lora_unet_joint_blocks_1_x_block_attn_qkv"
    both = {f"{fused}.lora_down.weight": np.ones((1, 16), np.float32), f"{fused}.lora_up.weight": np.ones((48, 1))}
    complain(
        lambda t: t.update(both), r"two updates of transformer\.transformer_blocks\.1\.attn\.to_[qkv], in two layouts"
    )
    dora = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.use_dora": True})}
    complain(lambda t: None, "is a DoRA and has no magnitude", dora)
    complain(lambda t: t.clear() or t.update(x=np.zeros(3, np.float32)), "'x', which is no part of a LoRA")
    loha = "transformer.transformer_blocks.1.attn.to_q.hada_w1_a"
    complain(lambda t: t.update({loha: t[name]}), "'.*hada_w1_a', which is part of a LoHa, not of a LoRA")
    complain(lambda t: t.clear(), "holds no LoRA matrices")
    complain(lambda t: None, "unreadable lora_adapter_metadata", {"lora_adapter_metadata": "{"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no LoRA file"):
        lora.load_lora(tmp_path / "empty", config)
    with pytest.raises(ValueError, match="--base"):
        convert.from_torch(file, tmp_path / "ours")
