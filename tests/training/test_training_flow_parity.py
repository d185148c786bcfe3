"""The flow stage against a training loop in PyTorch over diffusers' networks: losses, gradient norms, every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_diffusers
import toy_grpo

from unipic2_jax.data.buckets import Bucket
from unipic2_jax.data.examples import EXAMPLES, EndlessExamples, Example
from unipic2_jax.flow.loss import draw_corruption
from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.sd3 import mmdit_names as mmdit
from unipic2_jax.models.sd3 import vae_names as vae
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.models.sd3.vae import AutoencoderKL, VAEConfig
from unipic2_jax.optim.optimizer import merge_params
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training.config import make_stage
from unipic2_jax.training.stage import StageContext
from unipic2_jax.training.stages.flow import FlowStage
from unipic2_jax.weights import table

torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
pytest.importorskip("diffusers", reason="parity tests need diffusers")
from kontext_reference import kontext_forward  # noqa: E402

BATCH, STEPS = 4, 2  # the first update of Adam does not depend on its betas
RESOLUTION, MULTIPLE, ASPECT = 16, 4, "3:2"
HEIGHT, WIDTH, FACTOR = 12, 20, 2  # what that is in pixels, and pixels to a latent
TEXT, POOLED = 5, 24
POSITIONS = "pos_embed.pos_embed"  # a buffer there, a leaf that is not trained here
# Adam's first update is g / (|g| + eps). At 1e-8 that is a sign, which rounding decides where gradients nearly vanish; at
# this eps, near the size of the clipped gradients, it is a test of them.
LR, EPS = 3e-2, 1e-3
# Relative errors of each tensor. What is left of an update, after it was added to a weight, is the coarser for that; moments
# are those of gradients, and some gradients are small differences of large numbers.
LIMITS = {"weights": 1e-4, "mu": 3e-4, "nu": 3e-4, "updates": 5e-4}
# Name -> (task, norm that gradients are clipped at, other fields).
CASES = {
    "text to image": ("t2i", 1.0, {}),
    "edit": ("edit", 1.0, {}),
    "edit, error of the clean image": ("edit", 1.0, {"weighting": "sigma_squared"}),
    # With these levels the norms of the two steps are about 43.5 and 36.6: one is clipped and the other is not.
    "text to image, in two parts": ("t2i", 40.0, {"accumulation": 2, "timesteps": {"shift": 1.0}}),
}


class Noise(EndlessExamples):
    """Pictures, references and stored conditioning without any structure."""

    def __init__(self, seed=0, task="t2i"):
        super().__init__(task, RESOLUTION, MULTIPLE)
        self.seed, self.references = seed, int(task == "edit")
        self.buckets = {Bucket(ASPECT, self.references): 1.0}

    def example(self, index):
        rng = np.random.default_rng([self.seed, index])
        image, *references = rng.integers(0, 256, (1 + self.references, HEIGHT, WIDTH, 3), dtype=np.uint8)
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        arrays = {"context": normal(TEXT, tiny_diffusers.JOINT), "pooled": normal(POOLED)}
        return Example(image, "", tuple(references), arrays)


EXAMPLES["noise"] = Noise


def ours_from(model, module, rules, *inputs):
    """The parameters of a PyTorch network as those of our module, by the name table."""
    abstract = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return table.to_flax(rules(module.config), arrays, abstract)


def make(networks, task, clip_norm, tmp_path, **fields):
    """A stage over the networks' weights, with the paper's optimizer but for the rate and eps."""
    values = {"kind": "flow", "data": {"kind": "noise"}, "tasks": (task,), "batch_size": BATCH, "loader_threads": 0}
    values["optimizer"] = {"lr": LR, "schedule": "constant", "eps": EPS, "clip_norm": clip_norm}
    values["caption_dropout"] = {"t2i": 0.0, "edit": 0.0}
    config = make_stage({**values, **fields})
    transformer = MMDiT(MMDiTConfig.from_dict(networks[0].config))
    autoencoder = AutoencoderKL(VAEConfig.from_dict(networks[1].config))
    latents, images = jnp.zeros((1, HEIGHT // FACTOR, WIDTH // FACTOR, 4)), jnp.zeros((1, HEIGHT, WIDTH, 3))
    conditioning = jnp.zeros((1, TEXT, tiny_diffusers.JOINT)), jnp.zeros((1, POOLED))
    params = {
        "transformer": ours_from(networks[0], transformer, mmdit.rules, latents, jnp.zeros(1), *conditioning),
        "vae": ours_from(networks[1], autoencoder, vae.rules, images),
    }
    words = toy_grpo.WordConditioner(tiny_diffusers.JOINT, POOLED)
    bundle = Bundle(transformer, autoencoder, words, FlowMatchConfig(), params)
    mesh = make_mesh(jax.devices()[:1])
    FlowStage.check(config, mesh)
    return FlowStage(config, bundle, StageContext("flow", 0, 0, mesh, tmp_path))


def draws(stage):
    """What each step is about: its batch, and the noise and levels that it draws."""
    for step in range(STEPS):
        batch = stage.loader.batch(step)[1]
        shape, sampling = stage.flow_step.latent_shape(batch), stage.flow_step.sampling
        yield batch, draw_corruption(stage.context.key(step), shape, sampling)


def our_steps(stage):
    """After each step: the loss, the norm of its gradient, and {what: {PyTorch name: array}}."""
    state, rules = stage.init(), mmdit.rules(stage.bundle.transformer.config)
    named = lambda tree: dict(table.to_torch(rules, merge_params(tree, stage.frozen)["transformer"]))
    for step in range(STEPS):
        state, metrics = stage.step(state, step)
        moments = {what: named(optax.tree_utils.tree_get(state.opt_state, what)) for what in ("mu", "nu")}
        yield metrics["loss"], metrics["gradient_norm"], {**moments, "weights": named(state.trained)}


def tensor(array):
    """[..., H, W, C] -> [..., C, H, W]."""
    return torch.from_numpy(np.array(array)).movedim(-1, -3)


def their_loss(networks, batch, corruption, weighting):
    """As in diffusers' train_dreambooth_sd3.py, 'sigma_squared' being its `precondition_outputs`, which is its default."""
    transformer, autoencoder = networks

    def encode(pixels):
        with torch.no_grad():
            latents = autoencoder.encode(tensor(pixels).float() / 127.5 - 1).latent_dist.mode()
        return (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor

    latents, noise, sigma = encode(batch["images"]), tensor(corruption["noise"]), np.array(corruption["sigma"])
    sigmas = torch.from_numpy(sigma)[:, None, None, None]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    timestep, (context, pooled) = torch.from_numpy(1000 * sigma), map(torch.from_numpy, batch["conditioning"])
    if "reference_images" in batch:
        references = [encode(pixels) for pixels in batch["reference_images"].swapaxes(0, 1)]
        predicted = kontext_forward(transformer, noisy, timestep, context, pooled, references)
    else:
        predicted = transformer(noisy, context, pooled, timestep, return_dict=False)[0]
    target = noise - latents
    if weighting == "sigma_squared":
        predicted, target = predicted * (-sigmas) + noisy, latents
    return torch.mean((predicted - target) ** 2)


def their_steps(networks, clip_norm, weighting, drawn):
    """The same as `our_steps`, with PyTorch."""
    transformer = networks[0]
    optimizer = torch.optim.AdamW(transformer.parameters(), LR, betas=(0.9, 0.95), eps=EPS, weight_decay=0.05)
    for batch, corruption in drawn:
        loss = their_loss(networks, batch, corruption, weighting)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), clip_norm)
        optimizer.step()
        states = {name: optimizer.state[leaf] for name, leaf in transformer.named_parameters()}
        kept = {"mu": "exp_avg", "nu": "exp_avg_sq"}
        found = {what: {name: state[key] for name, state in states.items()} for what, key in kept.items()}
        found["weights"] = transformer.state_dict()
        yield loss.item(), norm.item(), jax.tree.map(lambda leaf: leaf.numpy().copy(), found)


def relative_error(got, want):
    """0 where both are 0."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def worst_errors(ours, theirs, before):
    """(largest relative error, name of the tensor) of the weights, Adam's moments, and what the step added to the weights."""
    change = lambda found: {name: leaf - before[name] for name, leaf in found["weights"].items()}
    ours, theirs = ({**found, "updates": change(found)} for found in (ours, theirs))
    worst = lambda got, want: max((relative_error(got[name], want[name]), name) for name in theirs["mu"])
    return {what: worst(ours[what], theirs[what]) for what in LIMITS}


@pytest.mark.parametrize("case", CASES)
def test_training_steps_equal_those_of_diffusers(case, tmp_path):
    task, clip_norm, fields = CASES[case]
    networks = tiny_diffusers.transformer(torch).train(), tiny_diffusers.vae(torch)
    before = {name: leaf.numpy().copy() for name, leaf in networks[0].state_dict().items()}
    stage = make(networks, task, clip_norm, tmp_path, **fields)
    wanted = list(their_steps(networks, clip_norm, stage.config.weighting, draws(stage)))
    assert [norm > clip_norm for _, norm, _ in wanted] == [True, clip_norm == 1.0], "what is clipped"
    for (our_loss, our_norm, ours), (loss, norm, theirs) in zip(our_steps(stage), wanted, strict=True):
        assert relative_error(our_loss, loss) < 1e-4 and relative_error(our_norm, norm) < 1e-4
        assert set(ours["weights"]) == set(theirs["weights"]) == {*theirs["mu"], POSITIONS}
        np.testing.assert_array_equal(ours["weights"][POSITIONS], before[POSITIONS])
        found = worst_errors(ours, theirs, before)
        print(*(f"{what} {error:.1e} ({name})" for what, (error, name) in found.items()), sep=", ")
        assert all(error < LIMITS[what] for what, (error, _) in found.items()), found
        before = theirs["weights"]
