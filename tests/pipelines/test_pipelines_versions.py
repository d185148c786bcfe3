"""What is exported and shipped is read by the transformers and diffusers of the authors' scripts, and by today's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unipic2_jax import pipelines
from unipic2_jax.models import bundle as bundles
from unipic2_jax.models.sd3.family import TOKENIZERS as SD3_TOKENIZERS
from unipic2_jax.models.tokenizer_files import FILES, ONLY_IN_5, TEMPLATES, save_tokenizer

TINY, TINY_METAQUERY, TINY_EDIT_REWARD = map(
    Path, (pipelines.TINY, pipelines.TINY_METAQUERY, pipelines.TINY_EDIT_REWARD)
)
TOKENIZERS = [*(TINY / name for name in SD3_TOKENIZERS), TINY_METAQUERY / "vlm"]
# Of the time of transformers 4.55, which the published scripts ask for.
OLD = ("transformers==4.55.*", "diffusers==0.35.*", "peft==0.17.*", "torch", "accelerate", "sentencepiece", "protobuf")
PROMPTS = ["a red circle above two blue squares", "Make the GREEN triangle cyan!", "  odd  spaces, 12 don't é", ""]
READ = """
    import json, sys, torch
    from pathlib import Path
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    text, metaquery, reward = map(Path, sys.argv[1:4])
    prompts = json.loads(sys.argv[4])
    pipe = StableDiffusion3Pipeline.from_pretrained(text)
    ids = lambda tokenizer: [tokenizer(prompt)["input_ids"] for prompt in prompts]
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    found = {name: ids(getattr(pipe, name)) for name in names}
    found |= {f"auto {name}": ids(AutoTokenizer.from_pretrained(text / name)) for name in names}
    talker = AutoTokenizer.from_pretrained(metaquery / "vlm")
    found["vlm"] = ids(talker)
    found["template"] = talker.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    found["limits"] = [pipe.tokenizer.model_max_length, pipe.tokenizer.pad_token, pipe.tokenizer_2.pad_token, talker.padding_side]
    networks = {name: getattr(pipe, name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")}
    networks["metaquery transformer"] = SD3Transformer2DModel.from_pretrained(metaquery / "transformer")
    networks["metaquery vae"] = AutoencoderKL.from_pretrained(metaquery / "vae")
    vlm = networks["vlm"] = Qwen2_5_VLForConditionalGeneration.from_pretrained(metaquery / "vlm", torch_dtype=torch.float32)
    found["sums"] = {name: float(sum(p.double().abs().sum() for p in net.parameters())) for name, net in networks.items()}
    try:
        from peft import PeftModel
        judge = PeftModel.from_pretrained(vlm, reward)
        found["lora"] = float(sum(p.double().abs().sum() for name, p in judge.named_parameters() if "lora_" in name))
    except ImportError:
        found["lora"] = None
    print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A Python with the versions of `OLD`: $UNIPIC2_OLD_ENV, or an environment that is made for the test."""
    if folder := os.environ.get("UNIPIC2_OLD_ENV"):
        return Path(folder) / "bin" / "python"
    if (uv := shutil.which("uv")) is None:
        pytest.skip("set UNIPIC2_OLD_ENV to an environment with transformers 4.55, or install uv, which makes one")
    folder = tmp_path_factory.mktemp("old")
    subprocess.run([uv, "venv", "-q", folder / "env"], check=True)
    command = [uv, "pip", "install", "-q", "--python", folder / "env/bin/python", *OLD]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"transformers 4.55 cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return folder / "env/bin/python"


def read(python, *folders):
    code = "\n".join(line.removeprefix("    ") for line in READ.splitlines())
    command = [python, "-c", code, *folders, json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("FOUND")[2])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both shipped models as a run exports them."""
    folder = tmp_path_factory.mktemp("exported")
    for name, model in (("text", TINY), ("metaquery", TINY_METAQUERY)):
        bundles.save_bundle(bundles.load_bundle(model), folder / name)
    return folder / "text", folder / "metaquery"


@pytest.mark.slow
def test_both_versions_read_what_is_shipped_and_exported(old, exported):
    pytest.importorskip("diffusers", reason="the newer version is the one that is installed")
    shipped, new = (read(python, TINY, TINY_METAQUERY, TINY_EDIT_REWARD) for python in (old, sys.executable))
    lora = shipped.pop("lora"), new.pop("lora")
    assert lora[0] and lora[1] in (None, pytest.approx(lora[0]))
    sums = shipped.pop("sums")
    assert new.pop("sums") == pytest.approx(sums) and shipped == new
    again = read(old, *exported, TINY_EDIT_REWARD)
    assert again.pop("sums") == pytest.approx(sums, rel=1e-3) and again.pop("lora")
    assert again == shipped
    # A model of random weights is written from tokenizers that no file holds.
    fresh = bundles.init_bundle("tiny")
    bundles.save_bundle(fresh, exported[0].parent / "fresh")
    assert (
        read(old, exported[0].parent / "fresh", TINY_METAQUERY, TINY_EDIT_REWARD)["tokenizer_3"] == new["tokenizer_3"]
    )


@pytest.mark.parametrize("folder", TOKENIZERS, ids=lambda folder: folder.name)
def test_the_shipped_tokenizers_are_for_both_versions(folder):
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert not set(ONLY_IN_5) & values.keys() and "extra_special_tokens" not in values
    names = {"CLIPTokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast"}
    assert values["tokenizer_class"] in names
    held = json.loads((folder / "tokenizer.json").read_text())
    if held["model"]["type"] == "BPE":
        special = {token["content"]: token["id"] for token in held["added_tokens"]}
        assert json.loads((folder / "vocab.json").read_text()) == held["model"]["vocab"] | special
        _, *pairs = (folder / "merges.txt").read_text().splitlines()
        assert [pair.split(" ") for pair in pairs] == held["model"]["merges"]


def test_an_export_has_its_sources_tokenizer_files_byte_for_byte(exported):
    for source in TOKENIZERS:
        out = exported[source.name == "vlm"] / source.name
        held = {name: (source / name).read_bytes() for name in (*FILES, *TEMPLATES) if (source / name).is_file()}
        assert len(held) >= 2 and {name: (out / name).read_bytes() for name in held} == held


def test_what_version_5_wrote_is_written_for_both(tmp_path):
    from transformers import AutoTokenizer

    for source in TOKENIZERS:
        original = AutoTokenizer.from_pretrained(source)
        original.save_pretrained(tmp_path / "new" / source.name)
        assert "backend" in json.loads((tmp_path / "new" / source.name / "tokenizer_config.json").read_text())
        loaded = AutoTokenizer.from_pretrained(tmp_path / "new" / source.name)
        save_tokenizer(loaded, tmp_path / "both" / source.name)
        test_the_shipped_tokenizers_are_for_both_versions(tmp_path / "both" / source.name)
        again = AutoTokenizer.from_pretrained(tmp_path / "both" / source.name)
        assert type(again) is type(original)
        for prompt in PROMPTS:
            assert again(prompt)["input_ids"] == original(prompt)["input_ids"]
