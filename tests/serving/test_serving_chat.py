"""The shipped tiny Qwen2.5-VL behind a chat endpoint, over real connections."""

import base64
import io

import numpy as np
import pytest
import requests
from PIL import Image

from unipic2_jax.core.assets import TINY_METAQUERY
from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.models.qwen.generation import SamplingConfig
from unipic2_jax.models.qwen.processor import user_message
from unipic2_jax.pipelines.chat import ChatModel
from unipic2_jax.rewards.base import RewardError, make_reward
from unipic2_jax.rewards.scoring import Scorer, make_entries
from unipic2_jax.serving.chat import make_server
from unipic2_jax.shapes.world import Scene, Thing, render

PICTURE = render(Scene("white", (Thing(0, "circle", "red", "large"),)))
QUESTION = "describe the image."


@pytest.fixture(scope="module")
def model():
    return ChatModel.load(TINY_METAQUERY)


@pytest.fixture(scope="module")
def server(model):
    with make_server(model, "tiny").running() as server:
        yield server


def data_url(kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def long_and_narrow():
    buffer = io.BytesIO()
    Image.new("RGB", (5000, 20)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asked(*parts, **fields):
    content = [*parts] or [{"type": "image_url", "image_url": {"url": data_url()}}, {"type": "text", "text": QUESTION}]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
        **fields,
    }


def post(server, body, **options):
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, **options)
    return answer.status_code, answer.json()


def test_it_answers_what_the_model_answers(server, model):
    conversation = [user_message([PICTURE], QUESTION)]
    (own,) = model.write([conversation], max_new_tokens=24)
    assert own.ended and model([conversation], max_new_tokens=24) == [own.text] and "circle" in own.text
    status, answer = post(server, asked())
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "message": {"role": "assistant", "content": own.text}, "finish_reason": "stop"}
    spelled = model.processor.tokenizer(own.text)["input_ids"]
    assert own.written == len(spelled) + 1  # and the token that ends the turn
    total = own.read + own.written
    assert answer["usage"] == {"prompt_tokens": own.read, "completion_tokens": own.written, "total_tokens": total}
    # Three more of the same task, a shorter answer: the same text, cut off.
    status, answer = post(server, asked(max_tokens=None, max_completion_tokens=3, n=1, stream=False, user="me"))
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3 and own.text.startswith(answer["choices"][0]["message"]["content"])


def test_sampling_is_by_the_seed(server, model):
    """Of a picture it is too sure; without one it makes something up."""
    fields = {"temperature": 2, "top_p": 0.95}
    first, again, other = (
        post(server, asked({"type": "text", "text": QUESTION}, **fields, seed=seed))[1]["choices"][0]
        for seed in (1, 1, 2)
    )
    own = model([[user_message([], QUESTION)]], max_new_tokens=24, sampling=SamplingConfig(2, 0.95), seed=1)
    assert first == again and first["message"]["content"] == own[0] and first != other


def test_models_and_health(server):
    found = requests.get(f"{server.url}/v1/models", timeout=5).json()
    assert found["object"] == "list" and [entry["id"] for entry in found["data"]] == ["tiny"]
    assert requests.get(f"{server.url}/health", timeout=5).json()["status"] == "ok"


def image(url):
    return asked({"type": "image_url", "image_url": url})


@pytest.mark.parametrize(
    "body, status, sentence",
    [
        ([], 400, "no JSON object"),
        (asked(stream=True), 400, "no stream True"),
        (asked(n=2), 400, "no n 2"),
        (asked(logprobs=True), 400, "no logprobs True"),
        (asked(tools=[{}]), 400, "no tools"),
        (asked(response_format={"type": "json_object"}), 400, "no response_format"),
        (asked(best_of=2), 400, "field 'best_of' is unknown"),
        (asked(model="gpt"), 404, "There is no model 'gpt' here; ask for 'tiny'."),
        (asked(temperature=-1), 400, "temperature is -1"),
        (asked(temperature="hot"), 400, "temperature is 'hot'"),
        (asked(top_p=0), 400, "top_p is 0"),
        (asked(max_tokens=0), 400, "max_tokens is 0"),
        (asked(max_tokens=1.5), 400, "max_tokens is 1.5"),
        (asked(max_tokens=5000), 400, "exceed the model's 512 positions"),
        (asked(seed=-1), 400, "seed is -1"),
        (asked(messages=[]), 400, "There are no messages"),
        (asked(messages=[{"role": "tool", "content": "a"}]), 400, "has the role 'tool'"),
        (asked(messages=[{"role": "user"}]), 400, "has no content"),
        (asked({"type": "video"}), 400, "neither a text nor an image_url"),
        (asked({"type": "text", "text": 5}), 400, "neither a text nor an image_url"),
        (asked({"type": "text", "text": "<|image_pad|>"}), 400, "image token(s) for 0 image(s)"),
        (image({"url": "http://169.254.169.254/a.png"}), 400, "is no data URL"),
        (image({"url": "file:///etc/passwd"}), 400, "is no data URL"),
        (image({"url": "data:image/png;base64,***"}), 400, "not base64"),
        (image({"url": "data:image/png;base64,aGFsbG8="}), 400, "cannot be decoded"),
        (image(None), 400, "is no data URL"),
        (image({"url": long_and_narrow()}), 400, "5000 x 20 pixels is more than 200 times as long as it is wide"),
        (asked({"type": "text", "text": "\ud83d"}), 400, "half a character in message 0"),
        (asked(messages=[{"role": "user", "content": "\ud83d"}]), 400, "half a character in message 0"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_with_a_sentence(server, body, status, sentence):
    found, answer = post(server, body)
    assert found == status and sentence in answer["error"]["message"], answer


def test_jpegs_texts_and_system_messages(server):
    messages = [
        {"role": "system", "content": "you see."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url("JPEG")}}]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": QUESTION},
    ]
    status, answer = post(server, asked(messages=messages))
    assert status == 200 and answer["choices"][0]["message"]["content"]


def test_a_judge_that_talks_gives_a_nan_with_a_sentence(server, tmp_path):
    """The tiny model describes; it knows no marks."""
    (tmp_path / "question.txt").write_text("$prompt")
    fields = {
        "base_url": f"{server.url}/v1", "model": "tiny", "api_key_env": "", "template": str(tmp_path / "question.txt"),
        "request": {"temperature": 0, "max_tokens": 64}, "retries": 1, "backoff": 0.01,
    }  # fmt: skip
    entries = make_entries({"judge": fields})
    scored = Scorer(entries).score([PICTURE] * 2, [PromptRecord(QUESTION), PromptRecord("make it blue", PICTURE)])
    assert np.isnan(scored.values["judge"]).all() and scored.errors["judge"].keys() == {0, 1}
    for sentence in scored.errors["judge"].values():
        assert sentence.startswith("The judge wrote "), sentence
    usage = entries["judge"].reward.usage
    assert usage.answers == 4 and usage.prompt_tokens > 4 * 20 and usage.completion_tokens >= 4


def test_a_question_that_is_too_long_for_the_model_is_said(server):
    reward = make_reward("judge", base_url=f"{server.url}/v1", model="tiny", api_key_env="")
    with pytest.raises(RewardError, match=r"status 400: 'A prompt of .* exceed the model's 512 positions"):
        reward.score([PICTURE], [PromptRecord(QUESTION)])
