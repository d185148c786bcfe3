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

from unipic2_jax.models.lora import LORA_TARGETS, count_matrices, init_lora, merge_lora  # noqa: E402
from unipic2_jax.models.mmdit import MMDiT  # noqa: E402
from unipic2_jax.weights import convert, io, lora, native, registry, table  # noqa: E402

RANK, ALPHA = 3, 7.5
TARGETS = [f"attn.{'to_out.0' if name == 'to_out' else name}" for name in LORA_TARGETS]


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
    return MMDiT(config, lora_alpha=ALPHA).apply(variables, *inputs(config))


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


def peft_transformer(folder, alpha=ALPHA, **fields):
    """The original with a random adapter that peft made."""
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    config = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False, **fields)
    torch.manual_seed(3)
    transformer.add_adapter(config)
    with torch.no_grad():
        for name, p in transformer.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    return transformer


def test_diffusers_applies_our_file(model, tmp_path):
    folder, config, params = model
    tree = random_lora(params)
    file = lora.save_lora(tmp_path, tree, ALPHA, config)
    assert file.name == "pytorch_lora_weights.safetensors"
    pipe = pipeline(folder)
    plain = theirs(pipe.transformer, config)
    pipe.load_lora_weights(tmp_path)
    applied = theirs(pipe.transformer, config)
    merged = ours(config, merge_lora(params, tree, ALPHA))
    assert error(merged, applied) <= 1e-4
    assert error(plain, applied) > 1e-2, "the update must be large enough to be seen"
    adapted = [name for name, _ in pipe.transformer.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == count_matrices(tree) == 3 * 8 - 1
    collection = ours(config, params, lora=tree)
    assert error(collection, applied) <= 1e-4


def test_we_apply_the_file_of_diffusers(model, tmp_path):
    folder, config, params = model
    transformer = peft_transformer(folder)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.utils.get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    tree, alpha = lora.load_lora(tmp_path, config)
    assert alpha == ALPHA and count_matrices(tree) == 23
    assert error(ours(config, merge_lora(params, tree, alpha)), theirs(transformer, config)) <= 1e-4


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_apply_the_folder_of_peft(model, tmp_path, use_rslora):
    folder, config, params = model
    transformer = peft_transformer(folder, use_rslora=use_rslora)
    state = {f"base_model.model.{k}": v for k, v in peft.utils.get_peft_model_state_dict(transformer).items()}
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "adapter_model.safetensors")
    transformer.peft_config["default"].save_pretrained(tmp_path)
    tree, alpha = lora.load_lora(tmp_path, config)
    assert error(ours(config, merge_lora(params, tree, alpha)), theirs(transformer, config)) <= 1e-4


def test_without_metadata_alpha_is_the_rank_as_diffusers_has_it(model, tmp_path):
    folder, config, params = model
    transformer = peft_transformer(folder, alpha=RANK)
    layers = peft.utils.get_peft_model_state_dict(transformer)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    tree, alpha = lora.load_lora(tmp_path, config)
    assert alpha == RANK
    assert error(ours(config, merge_lora(params, tree, alpha)), theirs(transformer, config)) <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_comes_back_bit_for_bit(model, tmp_path, dtype):
    folder, config, params = model
    file = lora.save_lora(tmp_path / "a.safetensors", random_lora(params), ALPHA, config, dtype)
    convert.from_torch(file, tmp_path / "ours", base=folder)
    convert.to_torch(tmp_path / "ours", tmp_path / "b.safetensors")
    before, after = io.read_header(file), io.read_header(tmp_path / "b.safetensors")
    assert before[1] == after[1] and before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        assert str(tensor.dtype) == dtype == str(after[0][name].dtype)
        assert tensor[...].tobytes() == after[0][name][...].tobytes(), name


def test_a_part_of_the_targets(model, tmp_path):
    folder, config, params = model
    tree = random_lora(params)
    for group in tree.values():
        group["attn"] = {name: pair for name, pair in group["attn"].items() if name in ("to_q", "to_k")}
    file = lora.save_lora(tmp_path, tree, ALPHA, config)
    read, alpha = lora.load_lora(file, config)
    assert alpha == ALPHA
    flat, wanted = table.flatten(read), table.flatten(tree)
    assert flat.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_array_equal(flat[path], wanted[path])
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path)
    assert error(ours(config, merge_lora(params, tree, ALPHA)), theirs(pipe.transformer, config)) <= 1e-4


def rewrite(file, out, change, metadata=None):
    tensors, header = io.read_header(file)
    tensors = {name: t[...] for name, t in tensors.items()}
    change(tensors)
    return io.write_file(out, tensors.items(), header if metadata is None else metadata)


def test_sentences(model, tmp_path):
    _, config, params = model
    file = lora.save_lora(tmp_path / "a.safetensors", random_lora(params), ALPHA, config)
    name = "transformer.transformer_blocks.1.attn.to_q.lora_A.weight"

    def complain(change, words, metadata=None):
        out = rewrite(file, tmp_path / "b.safetensors", change, metadata)
        with pytest.raises(ValueError, match=words) as error:
            lora.load_lora(out, config)
        assert str(out) in str(error.value) and "\n" not in str(error.value)

    complain(lambda t: t.pop(name), f"lacks the tensor '{name}'")
    complain(lambda t: t.update({name.replace("attn", "attn2"): t[name]}), "adapts 'transformer.*attn2.to_q.*nearest")
    complain(lambda t: t.update({name: np.zeros((RANK + 1, 16), np.float32)}), "different ranks")
    complain(lambda t: t.update({name: np.zeros((RANK, 15), np.float32)}), r"\(3, 15\).*\(3, 16\)")
    complain(lambda t: t.clear() or t.update(x=np.zeros(3, np.float32)), "holds no LoRA matrices")
    dora = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.use_dora": True})}
    complain(lambda t: None, "is a DoRA", dora)
    alphas = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn.to_q": 5}}
    complain(lambda t: None, "different ranks", {"lora_adapter_metadata": json.dumps(alphas)})
    complain(lambda t: None, "unreadable lora_adapter_metadata", {"lora_adapter_metadata": "{"})
    with pytest.raises(FileNotFoundError, match="holds neither"):
        lora.load_lora(tmp_path, config)
    with pytest.raises(ValueError, match="--base"):
        convert.from_torch(file, tmp_path / "ours")
