"""A schedule whose stages work on different models: what was trained goes along by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.models.model import MODELS
from unipic2_jax.training import loop
from unipic2_jax.training.config import make_config
from unipic2_jax.training.stage import STAGES, Stage, stage_fields


@dataclasses.dataclass(frozen=True)
class TwoBundle:
    params: dict

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class AddStage(Stage):
    """Adds 1 to one parameter in every step."""

    @classmethod
    def default_config(cls):
        config = stage_fields()
        config.path = ("transformer", "w")
        config.stop_at = -1
        return config

    def init(self):
        group, name = self.config.path
        return {"value": self.bundle.params[group][name]}

    def step(self, state, step):
        if step == self.config.stop_at and STOP:
            raise KeyboardInterrupt
        return {"value": state["value"] + 1}, {"loss": 0.0}

    def finish(self, state):
        group, name = self.config.path
        params = {**self.bundle.params, group: {**self.bundle.params[group], name: state["value"]}}
        return self.bundle.replace(params=params)


STAGES["add"] = AddStage
STOP = []
LOADED = []


def load(config, mesh):
    """Every model has a transformer; 'queries' belong to the one, 'words' to the other."""
    LOADED.append((config.model, config.init))
    own = {"main": "queries", "text": "words", "wide": "words"}[config.model]
    shape = (3,) if config.model == "wide" else (2,)
    params = {"transformer": {"w": jnp.zeros(shape)}, "conditioner": {own: jnp.full(2, 10.0)}}
    return TwoBundle(jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())))


def save(bundle, folder, changed):
    del changed
    folder.mkdir(parents=True)
    flat = {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(bundle.params)}
    np.savez(folder / "params.npz", **flat)


def config_of(other="text", **middle):
    stage = lambda *path, **fields: {"kind": "add", "steps": 3, "save_every": 1, "path": path, **fields}
    stages = {
        "queries": stage("conditioner", "queries"),
        "alone": stage("transformer", "w", model="other", **middle),
        "joint": stage("transformer", "w"),
    }
    values = {"model": "main", "init": "somewhere", "models": {"other": {"model": other}}}
    return make_config({**values, "schedule": tuple(stages), "stages": stages})


def exported(folder):
    with np.load(folder / "params.npz") as arrays:
        return {name: arrays[name].tolist() for name in arrays.files}


def test_what_each_model_has_trained_meets_in_the_last(tmp_path):
    LOADED.clear()
    found = exported(loop.run(config_of(), tmp_path / "run", load=load, save=save))
    # Three steps on the queries, three on the other model's transformer, three more on this one's; no words.
    assert found == {"['conditioner']['queries']": [13.0] * 2, "['transformer']['w']": [6.0] * 2}
    assert LOADED == [("main", "somewhere"), ("text", None), ("main", "somewhere")]


def test_it_goes_on_in_the_middle_of_the_other_model(tmp_path):
    STOP.append(True)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run(config_of(stop_at=1), tmp_path / "run", load=load, save=save)
    finally:
        STOP.clear()
    found = exported(loop.run(config_of(stop_at=1), tmp_path / "run", load=load, save=save))
    assert found == {"['conditioner']['queries']": [13.0] * 2, "['transformer']['w']": [6.0] * 2}


def test_models_that_do_not_exist_or_do_not_fit(tmp_path):
    config = config_of()
    config.stages.alone.model = "othr"
    with pytest.raises(ConfigError, match="did you mean 'other'"):
        loop.run(config, tmp_path / "a", load=load, save=save)
    config = config_of()
    config.models.other.ini = "x"
    with pytest.raises(ConfigError, match=r"config\.models\.other has no field 'ini'"):
        loop.run(config, tmp_path / "b", load=load, save=save)
    with pytest.raises(ConfigError, match="models of one size"):
        loop.run(config_of("wide"), tmp_path / "c", load=load, save=save)


class Ten:
    """A kind of model that `config.model` names, in a layout of its own."""

    def __init__(self, params):
        self.params = params

    @classmethod
    def start(cls, start, mesh=None, precision=None):
        del mesh, precision
        return cls({"transformer": {"w": jnp.full(start.settings["count"], 10.0)}})

    def replace(self, params):
        return Ten(params)

    def save(self, folder, dtype=None, changed=None, with_vlm=True):
        folder.mkdir()
        (folder / "ten.txt").write_text(f"{self.params['transformer']['w'].tolist()} {dtype} {changed} {with_vlm}")


@pytest.mark.parametrize(
    "precision, how", [("float32", "float32 None"), ("mixed", "None dict_keys(['transformer/w'])")]
)
def test_another_kind_of_model_is_one_class(tmp_path, monkeypatch, precision, how):
    monkeypatch.setitem(MODELS, "ten", Ten)
    stages = {"alone": {"kind": "add", "steps": 2, "path": ("transformer", "w")}}
    values = {"model": "ten", "settings": {"count": 2}, "precision": precision, "schedule": ("alone",)}
    folder = loop.run(make_config({**values, "stages": stages}), tmp_path / "run")
    assert (folder / "ten.txt").read_text() == f"[12.0, 12.0] {how} True"
