"""Hub ids against a hub on this machine: which thing is wrong, its remedy, revisions, resumption and the offline cache."""

import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants
from loopback_hub import COMMIT, loopback_hub

from unipic2_jax.core import hub

SD = "stabilityai/stable-diffusion-3.5-medium"
PATTERNS = ["*.json", "transformer/*.safetensors"]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "run_me.py").write_text("raise SystemExit")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(400_000))
    return folder


@pytest.fixture
def served(files, tmp_path, monkeypatch):
    with loopback_hub(
        {SD: files, "us/secret": files, "us/open": files},
        tokens={"ours", "strangers"},
        gated={SD: {"ours"}},
        private={"us/secret": {"ours"}},
    ) as server:
        set_endpoint(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield server


def set_endpoint(monkeypatch, url):
    """As $HF_ENDPOINT, which is read when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def fails(source):
    with pytest.raises(FileNotFoundError) as caught:
        hub.snapshot(source, PATTERNS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gated_model(served, files, monkeypatch):
    assert fails(SD) == (
        f"The model {SD} is gated and you have no access; accept its licence at {served.url}/{SD} with your account, then run "
        "`hf auth login`."
    )
    monkeypatch.setenv("HF_TOKEN", "strangers")
    assert "wait where its authors have to agree, and let your token read gated repositories" in fails(SD)
    monkeypatch.setenv("HF_TOKEN", "ours")
    folder = hub.snapshot(SD, PATTERNS)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (files / weights).read_bytes()
    assert not (folder / "run_me.py").exists()


def test_private_missing_and_misspelt(served, monkeypatch):
    assert fails("us/secret").startswith(
        "There is no folder us/secret, and the hub shows no model of that id to those who are not"
    )
    assert "if it is private, run `hf auth login`" in fails("us/secret")
    wrong = fails("stabilityai/stable-difusion-3.5-medium")
    assert f"(nearest: '{SD}'); correct the name" in wrong
    assert "nearest" not in fails("us/nothing_of_that_kind")
    monkeypatch.setenv("HF_TOKEN", "strangers")
    assert "to the account of your token" in fails("us/secret") and "let that account see it" in fails("us/secret")
    monkeypatch.setenv("HF_TOKEN", "ours")
    assert hub.snapshot("us/secret", PATTERNS).is_dir()


def test_a_bad_token(served, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "expired")
    for name in (SD, "us/open"):
        assert fails(name).startswith(
            f"The hub does not accept your token, and so gives no {name}; run `hf auth login`"
        )


def test_a_revision(served):
    assert hub.snapshot("us/open@v1", PATTERNS).name == hub.snapshot(f"us/open@{COMMIT}", PATTERNS).name == COMMIT
    assert fails("us/open@v2").startswith("The model us/open has no revision 'v2'; look at")


def test_offline(served, monkeypatch, tmp_path):
    hub.snapshot("us/open", PATTERNS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.close_session()  # whose client is made offline or not
    seen = len(served.requests)
    assert hub.snapshot("us/open", PATTERNS).is_dir()
    wrong = fails(SD)
    assert str(tmp_path / "cache") in wrong and "unset HF_HUB_OFFLINE" in wrong
    assert len(served.requests) == seen
    monkeypatch.undo()
    huggingface_hub.utils.close_session()


def test_an_unreachable_hub_and_what_is_no_model(served, monkeypatch, files):
    shutil.rmtree(files / "transformer")
    (files / "model_index.json").unlink()
    assert "holds no model in a layout that is read here" in fails("us/open")
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert "The hub at http://127.0.0.1:9 cannot be reached for us/other" in fails("us/other")
    assert "write owner/name or owner/name@revision" in fails("a/b/c")


def test_a_download_is_shown_goes_on_where_it_broke_off(served, tmp_path):
    weights = served.folders[SD] / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(bytes(range(256)) * 44_000)
    served.cut_after = 11_000_000  # it reads pieces of 10 MiB
    environment = {**os.environ, "HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "ours"}
    code = f"from unipic2_jax.core import hub; print(hub.snapshot({SD!r}, {PATTERNS!r}))"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip().startswith(str(tmp_path / "home" / "hub"))
    assert "%|" in ran.stderr  # a bar
    ranges = [asked for method, path, asked in served.requests if method == "GET" and "safetensors" in path]
    assert ranges == [None, "bytes=10485760-"]
    assert next((tmp_path / "home").rglob("*.safetensors")).read_bytes() == weights.read_bytes()
