"""The tiny vision-language model's tokenizer."""

import jax
import numpy as np
from PIL import Image
from qwen_reference import SMALL

from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.models.qwen.processor import VLMProcessor
from unipic2_jax.shapes.pool import WORDS
from unipic2_jax.shapes.questions import QUESTION_TAGS, QUESTION_WORDS, random_question
from unipic2_jax.shapes.vlm_processor import SPECIAL, build_vlm_processor, vocabulary
from unipic2_jax.shapes.world import render

VOCAB, _ = vocabulary([*WORDS, *QUESTION_WORDS])
NAMES = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
NAMES |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
CONFIG = Qwen2_5_VLConfig.from_dict(
    {**SMALL.to_dict(), "vocab_size": len(VOCAB), **{field: VOCAB[f"<|{name}|>"] for field, name in NAMES.items()}}
)
PROCESSOR = build_vlm_processor([*WORDS, *QUESTION_WORDS], CONFIG, 48 * 48)


def test_words_are_single_tokens_and_everything_comes_back():
    tokenizer = PROCESSOR.tokenizer
    for word in (*WORDS, *QUESTION_WORDS):
        assert len(tokenizer(word)["input_ids"]) == len(tokenizer(f" {word}")["input_ids"]) == 1
    rng = np.random.default_rng(0)
    for tag in QUESTION_TAGS:
        for _ in range(30):
            answer = random_question(rng, tag).answer
            ids = tokenizer(answer)["input_ids"]
            assert tokenizer.decode(ids) == answer and len(ids) <= 40
    # Anything else is spelled in bytes.
    odd = "zebra – 42 ünicode\n"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    assert tokenizer("RED")["input_ids"] == tokenizer("red")["input_ids"]
    assert len(tokenizer) == len(VOCAB) and list(VOCAB)[-len(SPECIAL) :] == list(SPECIAL)


def test_a_saved_processor_reads_a_picture_the_same_way(tmp_path):
    question = random_question(np.random.default_rng(1), "box")
    content = [{"type": "image", "image": Image.fromarray(render(question.scene))}, {"type": "text", "text": "where?"}]
    conversation = [[{"role": "user", "content": content}]]
    PROCESSOR.save(tmp_path)
    again = VLMProcessor.load(tmp_path, CONFIG)
    first, second = PROCESSOR(conversation), again(conversation)
    np.testing.assert_array_equal(first.input_ids, second.input_ids)
    jax.tree.map(np.testing.assert_array_equal, first.vision, second.vision)
    # 48 x 48 pixels of 4 x 4 patches, merged two by two.
    assert (first.input_ids == CONFIG.image_token_id).sum() == 36
    assert PROCESSOR.stop_tokens == again.stop_tokens == (VOCAB["<|endoftext|>"], VOCAB["<|im_end|>"])
