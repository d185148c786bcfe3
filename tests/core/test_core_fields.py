"""Every field of every configuration that is read from a file has the type that it is annotated with, or is a sentence."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from unipic2_jax import pipelines
from unipic2_jax.core.fields import check_fields, hints
from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.models import registry
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.edit_reward.model import Spec

TINY, TINY_METAQUERY = Path(pipelines.TINY), Path(pipelines.TINY_METAQUERY)
# In both shipped models, and in the one that judges edits.
CONFIGS = {
    **{part: TINY / part / "config.json" for part in ("transformer", "vae", "text_encoder")},
    "text_encoder_3": TINY / "text_encoder_3/config.json",
    **{part: TINY_METAQUERY / part / "config.json" for part in ("conditioner", "vlm")},
    "scheduler": TINY / "scheduler/scheduler_config.json",
    "edit_reward": Path(pipelines.TINY_EDIT_REWARD) / "config.json",
}
WRONG = {int: [1, 2, 3], float: [], str: 7, bool: "yes"}


def read(part, folder):
    if part == "scheduler":
        return FlowMatchConfig.load(folder)
    return Spec.read(folder) if part == "edit_reward" else registry.read_network(folder)[1]


def fields(config, values, where=()):
    """Paths of fields in the file, and a value that none of them can have."""
    for name, hint in hints(type(config)).items():
        if isinstance(hint, type) and issubclass(hint, ModelConfig):
            yield from fields(getattr(config, name), values[name], (*where, name))
        if name in values:
            yield (*where, name), WRONG.get(hint, {"a": 1} if not dataclasses.is_dataclass(hint) else 3)


@pytest.mark.parametrize("part", CONFIGS)
def test_a_value_of_another_type_is_one_sentence_for_every_field(tmp_path, part):
    file = tmp_path / CONFIGS[part].name
    original = json.loads(CONFIGS[part].read_text())
    file.write_text(json.dumps(original))
    found = list(fields(read(part, tmp_path), original))
    assert len(found) >= 2
    for path, wrong in found:
        values = json.loads(json.dumps(original))
        node = values
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = wrong
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError) as error:
            read(part, tmp_path)
        said = str(error.value)
        if path == ("targets",):
            assert "holds no EditReward" in said
        else:
            assert f"{file}: the field '{'.'.join(path)}' is {wrong!r}, and it must be " in said
        assert "\n" not in said and said.endswith(".")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("vocab_size", [1, 2, 3], r"the field 'vocab_size' is \[1, 2, 3\], and it must be a whole number\."),
        ("vocab_size", True, r"the field 'vocab_size' is True"),
        ("vocab_size", 40.0, r"the field 'vocab_size' is 40\.0"),
        ("rms_norm_eps", None, r"the field 'rms_norm_eps' is None, and it must be a finite number\."),
        ("tie_word_embeddings", "yes", r"the field 'tie_word_embeddings' is 'yes', and it must be true or false\."),
        ("text_config", [1], r"the field 'text_config' is \[1\], and it must be an object or null\."),
        ("text_config", {"hidden_size": "112"}, r"the field 'text_config\.hidden_size' is '112'"),
        ("rope_scaling", "mrope", r"the field 'rope_scaling' is 'mrope', and it must be an object or null\."),
        ("rope_scaling", {"type": "mrope", "mrope_section": "abc"}, r"the field 'mrope_section' is 'abc'"),
        ("vision_config", {"in_chans": "3"}, r"the field 'vision_config\.in_chans' is '3'"),
        ("architectures", 3, r"the field 'architectures' is 3, and it must be a list of texts or null\."),
    ],
)
def test_a_language_models_other_names_are_held_to_their_types(tmp_path, name, value, sentence):
    values = json.loads(CONFIGS["vlm"].read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, name: value}))
    with pytest.raises(ValueError, match=sentence):
        registry.read_network(tmp_path)


def test_a_whole_number_is_a_number_and_extra_fields_are_left_alone():
    check_fields(hints(FlowMatchConfig), {"num_train_timesteps": 3, "shift": 3, "other": object()})
    for values in ({"num_train_timesteps": []}, {"num_train_timesteps": 2.5}, {"shift": float("nan")}):
        with pytest.raises(ValueError, match=f"the field '{next(iter(values))}'"):
            check_fields(hints(FlowMatchConfig), values)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (TINY, {"max_sequence_length": "77"}),
        (TINY, {"edit_negative": 3}),
        (TINY_METAQUERY, {"vision_scale": [1]}),
        (TINY_METAQUERY, {"positions": None}),
    ],
)
def test_a_models_settings_are_held_to_their_types(tmp_path, model, settings):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model/unipic2.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"unipic2.json: the field '{next(iter(settings))}' is "):
        pipelines.load_bundle(tmp_path / "model")
