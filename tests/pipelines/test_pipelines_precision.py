"""Mixed precision from files to memory and back: bits that stay, and what is rounded on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edit_reward_models import make_model, pictures
from pipelines_common import small_bundle

from unipic2_jax import pipelines
from unipic2_jax.core.assets import TINY
from unipic2_jax.models import convert, sampling
from unipic2_jax.models.edit_reward.model import EditRewardModel
from unipic2_jax.models.sd3 import mmdit_names as mmdit
from unipic2_jax.weights import io, table
from unipic2_jax.weights.precision import PRECISIONS, as_precision

BRAIN, HALF, SINGLE = jnp.dtype("bfloat16"), np.dtype("float16"), np.dtype("float32")
# What the networks' files hold; one of the transformer's tensors, and one layer of a stack, are float32 all the same.
STORED = {"transformer": BRAIN, "vae": SINGLE, "text_encoder": HALF, "text_encoder_2": SINGLE, "text_encoder_3": HALF}
SINGLES = ("proj_out.weight", "transformer_blocks.1.attn.to_q.weight")


def dtype_of(network, tensor):
    return SINGLE if network == "transformer" and tensor in SINGLES else STORED[network]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = pipelines.save_bundle(small_bundle(), tmp_path_factory.mktemp("files") / "model")
    for network in STORED:
        tensors = {name: np.asarray(t) for name, t in io.open_folder(folder / network).items()}
        stem = io.weight_stem(folder / network)
        cast = ((name, t.astype(dtype_of(network, name))) for name, t in tensors.items())
        io.write_folder(folder / network, stem, cast)
    return folder


def read(folder, network):
    return {name: np.asarray(tensor) for name, tensor in io.open_folder(folder / network).items()}


def same_bits(one, other):
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def test_files_are_kept_in_their_sixteen_bits(files):
    bundle = pipelines.load_bundle(files, "mixed")
    assert {m.dtype for m in (bundle.transformer, bundle.vae, *bundle.conditioner.modules.values())} == {BRAIN}
    kept = {**bundle.params["conditioner"], "vae": bundle.params["vae"]}
    for network, tree in kept.items():
        wanted = BRAIN if STORED[network] == SINGLE else STORED[network]
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {wanted}, network
    assert {leaf.dtype for leaf in jax.tree.leaves(bundle.params["transformer"])} == {BRAIN}
    ours = dict(table.to_torch(mmdit.rules(bundle.transformer.config), bundle.params["transformer"]))
    for name, tensor in read(files, "transformer").items():
        assert same_bits(ours[name], tensor.astype(BRAIN)), name


@pytest.mark.parametrize("native", [False, True])
def test_an_export_copies_what_was_not_trained(files, tmp_path, native):
    source = files
    if native:
        convert.from_torch(files, source := tmp_path / "native")
    bundle = pipelines.load_bundle(source, "mixed")
    params = table.flatten(bundle.params)
    trained = {name: 1.25 * params[name].astype(SINGLE) for name in params if name.endswith("attn/to_q/kernel")}
    trained = {name: leaf for name, leaf in trained.items() if name.startswith("transformer/")}
    bundle = bundle.replace(params=table.unflatten({**params, **trained}))
    export = pipelines.save_bundle(bundle, tmp_path / "export", None, changed=set(trained))
    for network in STORED:
        before, after = read(files, network), read(export, network)
        assert set(before) == set(after)
        for name, tensor in before.items():
            if network == "transformer" and name.endswith("attn.to_q.weight"):
                wanted = 1.25 * tensor.astype(BRAIN).astype(SINGLE)
                assert same_bits(after[name], wanted.astype(dtype_of(network, name))), name
            else:
                assert same_bits(after[name], tensor), (network, name)
    assert len(trained) == 3


def test_diffusers_reads_an_export_of_several_dtypes(files, tmp_path):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    export = pipelines.save_bundle(pipelines.load_bundle(files, "mixed"), tmp_path, None, changed=())
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(export, torch_dtype=torch.float32)
    state = pipe.transformer.state_dict()
    for name, tensor in read(files, "transformer").items():
        np.testing.assert_array_equal(state[name].numpy(), tensor.astype(SINGLE))


def test_latents_in_sixteen_bits_are_close():
    """What training takes from the VAE: the moments, which are float32 whatever the arithmetic."""
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 48, 48, 3)), SINGLE)
    ramp = jnp.linspace(-1, 1, 48)
    images = jnp.concatenate([images, jnp.broadcast_to(ramp[:, None, None], (1, 48, 48, 3))])
    made = []
    for name in PRECISIONS:
        bundle = pipelines.load_bundle(TINY, name)
        latents = jax.jit(lambda params, x, vae=bundle.vae: sampling.encode_images(vae, params, x))
        made.append(np.asarray(latents(bundle.params["vae"], images)))
        assert made[-1].dtype == SINGLE
    error = np.linalg.norm(made[1] - made[0]) / np.linalg.norm(made[0])
    print(f"relative error of latents in bfloat16: {error:.2e}")
    assert 0 < error < 0.02


def test_a_judge_keeps_what_scores_need(tmp_path):
    folder = make_model(tmp_path / "vlm").save(tmp_path / "reward")
    whole, lean = (EditRewardModel.load(folder, scoring=scoring) for scoring in (False, True))
    assert "lm_head" in whole.params["vlm"] and "lm_head" not in lean.params["vlm"]
    asked = (pictures(2), pictures(2, 1), ["one", "two"])
    np.testing.assert_array_equal(whole.score(*asked), lean.score(*asked))
    held = EditRewardModel.load(folder, None, PRECISIONS["mixed"], scoring=True)
    assert {leaf.dtype for leaf in jax.tree.leaves((held.params["vlm"], held.params["lora"]))} == {BRAIN}
    assert {leaf.dtype for leaf in jax.tree.leaves(held.params["head"])} == {SINGLE}


def test_a_precision_is_a_policy_its_name_or_a_dtype():
    assert as_precision() == as_precision("float32") == PRECISIONS["float32"]
    assert as_precision(PRECISIONS["mixed"]) is as_precision("mixed")
    assert as_precision("bfloat16").kept("float16") == BRAIN and as_precision("mixed").kept("float16") == HALF
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        as_precision("int8")
