"""Flow stages on prepared files: shapes, parts, precision, stored latents, validation, and going on after a kill."""

import dataclasses
import multiprocessing
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_flow
import toy_grpo
from ml_collections import ConfigDict
from prepared_files import picture, write_prepared

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.buckets import Bucket
from unipic2_jax.optim.optimizer import check_rules, make_optimizer, optimizer_fields
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.pictures.decode import decode
from unipic2_jax.training.config import make_stage
from unipic2_jax.training.metrics import read_rows
from unipic2_jax.training.stage import StageContext
from unipic2_jax.training.stages.flow import FlowStage
from unipic2_jax.weights.precision import PRECISIONS

# One shape for each task: every shape costs a compilation.
SQUARE = {Bucket("1:1"): 40, Bucket("1:1", 1): 16}
ONE = {"tasks": ("edit",)}


def written(where, counts, **options):
    return write_prepared(where, counts, toy_flow.RESOLUTION, toy_flow.MULTIPLE, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("files") / "prepared", SQUARE)


def make(folder, tmp_path, said=None, bundle=None, precision="float32", **changes):
    config = make_stage(toy_flow.fields(folder, **changes))
    mesh = make_mesh(jax.devices()[:1])
    FlowStage.check(config, mesh)
    said = said if said is not None else []
    context = StageContext("flow", 0, 0, mesh, tmp_path, log=said.append, precision=PRECISIONS[precision])
    return FlowStage(config, bundle or toy_grpo.load(ConfigDict({"precision": precision}), mesh), context)


def leaves_close(one, two, tolerance):
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (one, two)), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * (np.linalg.norm(b) + 1e-12), jax.tree_util.keystr(path)


def test_every_shape_of_a_phase_is_compiled_before_its_first_step(tmp_path):
    said, where = [], written(tmp_path / "several", {**SQUARE, Bucket("16:9"): 24})
    stage = make(where, tmp_path, said, resolutions=((0.0, 2), (0.5, 4)))
    state, counts = stage.init(), []
    for step in range(12):
        state, _ = stage.step(state, step)
        counts.append(len(stage.ahead.programs))
    # 2 x 2 whatever the aspect ratio, with and without a reference; then 4 x 4 and 6 x 4, and 4 x 4 with one: all are asked for
    # in the first step, each is compiled once, and what is not needed yet does not hold up what is.
    assert counts == [5] * 12
    compiled = [sentence for sentence in said if "compiled the step for" in sentence]
    assert len(compiled) == 5 and compiled[0].endswith(" s")
    assert "t2i 6x4" in "".join(compiled) and "edit 4x4 + 1 reference(s)" in "".join(compiled)


def test_a_batch_in_parts_is_the_batch(folder, tmp_path):
    options = {**ONE, "latents": "sample", "caption_dropout": {"edit": 0.5}}
    optimizer = {"name": "adam", "eps": 1.0, "lr": 1e-2, "clip_norm": 0.0, "trainable": "^(transformer|conditioner)/"}
    whole, parts = (make(folder, tmp_path, accumulation=n, optimizer=optimizer, **options) for n in (1, 4))
    (a, one), (b, four) = whole.step(whole.init(), 0), parts.step(whole.init(), 0)
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
    assert one["gradient_norm"] == pytest.approx(four["gradient_norm"], rel=1e-5)
    leaves_close(a.opt_state, b.opt_state, 1e-5)
    with pytest.raises(ConfigError, match="cannot be split into 3 parts"):
        make(folder, tmp_path, accumulation=3)


def test_bfloat16_computes_and_float32_remembers(folder, tmp_path):
    full, half = (make(folder, tmp_path, precision=name, **ONE) for name in ("float32", "mixed"))
    (_, one), (b, two) = full.step(full.init(), 0), half.step(half.init(), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves((b.trained, b.ema))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(half.frozen)} == {jnp.dtype("bfloat16")}
    assert one["loss"] != two["loss"] and one["loss"] == pytest.approx(two["loss"], rel=0.05)
    assert half.flow_step.transformer.dtype == jnp.bfloat16 and full.flow_step.transformer.dtype == jnp.float32


def test_stored_latents_are_those_that_training_would_compute(folder, tmp_path):
    plain = make(folder, tmp_path, **ONE, latents="sample")

    def moments(number, bucket):
        """What the VAE makes of the pictures that `write_prepared` writes."""
        if not bucket.references:
            return {}
        target, reference = (np.asarray(decode(picture(number + 1000 * r, 4, 4))) for r in (0, 1))
        batch = {"images": jnp.asarray(target)[None], "reference_images": jnp.asarray(reference)[None, None]}
        return {
            name: np.asarray(x[0]) for name, x in plain.flow_step.moments(plain.bundle.params["vae"], batch).items()
        }

    where = written(tmp_path / "stored", SQUARE, arrays=moments)
    data = {"kind": "prepared", "path": str(where), "stored": ("latents",)}
    stored = make(where, tmp_path, **ONE, latents="sample", data=data)
    batch = stored.loader.batch(0)[1]
    assert set(batch) == {"mean", "logvar", "reference_mean", "reference_logvar", "tokens"}
    one, two = plain.step(plain.init(), 0)[1], stored.step(stored.init(), 0)[1]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    # Samples are around the modes, and every picture has noise of its own.
    keys, vae = jax.random.split(jax.random.key(0), 8), stored.bundle.params["vae"]
    sampled = stored.flow_step.latents(vae, batch, keys)
    modes = dataclasses.replace(stored.flow_step, sample_latents=False).latents(vae, batch, keys)
    for name, deviation in (("latents", batch["logvar"]), ("references", batch["reference_logvar"])):
        noise = (np.asarray(sampled[name]) - np.asarray(modes[name])) / np.exp(0.5 * deviation)
        noise = noise / stored.bundle.vae.config.scaling_factor
        assert 0.8 < noise.std() < 1.2 and len(np.unique(noise.round(5))) > 0.9 * noise.size


def test_stored_conditioning_replaces_the_conditioner(folder, tmp_path):
    optimizer = {"lr": 3e-3, "trainable": "^transformer/"}
    options = {"tasks": ("t2i",), "caption_dropout": {"t2i": 0.5}, "optimizer": optimizer}
    plain = make(folder, tmp_path, **options)

    def conditioning(number, bucket):
        tokens = plain.collate.reader.tokenize([str(number)])
        context, pooled = plain.bundle.conditioner.apply(plain.bundle.params["conditioner"], tokens)
        return {"context": np.asarray(context[0]), "pooled": np.asarray(pooled[0])}

    where = written(tmp_path / "stored", SQUARE, arrays=conditioning)
    data = {"kind": "prepared", "path": str(where), "stored": ("conditioning",)}
    stored = make(where, tmp_path, **options, data=data)
    assert "tokens" not in stored.loader.batch(0)[1]
    one, two = plain.step(plain.init(), 0)[1], stored.step(stored.init(), 0)[1]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    both = {**options, "optimizer": {**optimizer, "trainable": "^(transformer|conditioner)/"}}
    useless = make(where, tmp_path, **both, data=data)
    with pytest.raises(ConfigError, match="nothing to learn for the conditioner"):
        useless.step(useless.init(), 0)


def test_validation_is_the_same_question_every_time(folder, tmp_path):
    validation = {"data": {"kind": "prepared", "path": str(folder)}, "batches": 2, "sigmas": (0.2, 0.9)}
    stage = make(folder, tmp_path, validation=validation)
    state = stage.init()
    first = stage.evaluate(state, 0)["metrics"]
    assert set(first) == {f"validation/{t}{end}" for t in ("t2i", "edit") for end in ("", "/sigma_0.2", "/sigma_0.9")}
    assert stage.evaluate(state, 5)["metrics"] == first
    for step in range(12):
        state, _ = stage.step(state, step)
    after = stage.evaluate(state, 12)["metrics"]
    assert after["validation/t2i"] < first["validation/t2i"] and after["validation/edit"] < first["validation/edit"]


def test_rates_and_frozenness_follow_the_rules():
    params = {"transformer": {"a": jnp.ones(3), "b": jnp.ones(3)}, "conditioner": {"c": jnp.ones(3)}}
    fields = optimizer_fields()
    fields.lr, fields.weight_decay = 0.1, 0.5
    fields.lr_scales = (("/a$", 0.0), ("^transformer/", 0.5))
    optimizer = make_optimizer(fields, 10)
    gradients = jax.tree.map(lambda x: 2 * x, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["transformer"]["a"], 0)
    np.testing.assert_allclose(2 * updates["transformer"]["b"], updates["conditioner"]["c"], rtol=1e-6)
    assert updates["conditioner"]["c"][0] < -0.1
    for wrong in ((("(", 1.0),), ("^a",), (("^a", "fast"),)):
        fields.lr_scales = wrong
        with pytest.raises(ConfigError, match="pairs of a regex and a factor"):
            make_optimizer(fields, 10)
    check_rules((("/a$", 0.0), ("^cond", 0.5)), params)
    with pytest.raises(
        ConfigError, match=r"'\^dit/' matches nothing that is trained; the names look like conditioner/c"
    ):
        check_rules((("/a$", 0.0), ("^dit/", 0.5)), params)


def test_what_does_not_fit_is_said_before_work_starts(folder, tmp_path):
    with pytest.raises(ConfigError, match="asks for 8 pixels but the data has 4"):
        make(folder, tmp_path, resolutions=((0.0, 8),))
    with pytest.raises(ValueError, match="ascend from 0"):
        make(folder, tmp_path, resolutions=((0.5, 4),))
    several = written(tmp_path / "several", {**SQUARE, Bucket("16:9"): 24})
    with pytest.raises(ConfigError, match="one shape for each task, and here are 3"):
        make(several, tmp_path, pool=256)
    with pytest.raises(ConfigError, match="one shape for each task, and here are 4"):
        make(folder, tmp_path, pool=256, resolutions=((0.0, 2), (0.5, 4)))
    with pytest.raises(ConfigError, match="use one of mode, sample"):
        make(folder, tmp_path, latents="mean")


def test_a_killed_run_over_files_goes_on_bit_for_bit(folder, tmp_path):
    context = multiprocessing.get_context("spawn")
    toy_flow.run(tmp_path / "whole", folder)
    for kill_at in (5, 8):
        process = context.Process(target=toy_flow.child, args=(str(tmp_path / "killed"), str(folder), kill_at))
        process.start()
        process.join(600)
        assert process.exitcode == -signal.SIGKILL
    toy_flow.run(tmp_path / "killed", folder)
    found = []
    for name in ("whole", "killed"):
        with np.load(tmp_path / name / "export" / "params.npz") as arrays:
            params = {key: arrays[key].tobytes() for key in arrays.files}
        rows = [row for row in read_rows(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        found.append((params, [(row["total_step"], row["loss"], row["gradient_norm"]) for row in rows]))
    assert found[0][1] == found[1][1] and len(found[0][1]) == 16
    assert found[0][0] == found[1][0]
