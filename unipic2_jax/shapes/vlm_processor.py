"""Builds a tokenizer in Qwen2.5-VL's format from a list of words, and with it the processor of a tiny vision-language model."""

from __future__ import annotations

from collections.abc import Sequence

from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.models.qwen.processor import VLMProcessor, pixel_limits
from unipic2_jax.shapes.tokenizers import byte_characters, byte_pair_merges

# Qwen's special tokens that its template and its images need, in its order.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
# How Qwen cuts text before it merges bytes: words with what stands before them, single digits, runs of punctuation, blanks.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # contractions are left out
)
# Words of the template, and the punctuation of a list of boxes.
TEMPLATE_WORDS = ("system", "user", "assistant", "you", "are", "a", "helpful", "generate", "an", "image")
PUNCTUATION = ('[{"', '":', " [", ' "', '"}]', "],", "_")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges: bytes, then every word with and without a blank before it, then the special tokens."""
    characters = byte_characters()
    spelled = lambda text: [characters[byte] for byte in text.encode()]
    texts = [text for word in dict.fromkeys([*TEMPLATE_WORDS, *words]) for text in (word, f" {word}")]
    merges = byte_pair_merges([spelled(text) for text in (*PUNCTUATION, *texts)])
    tokens = [*characters.values(), *(a + b for a, b in merges), *SPECIAL]
    return {token: i for i, token in enumerate(tokens)}, merges


def build_vlm_processor(words: Sequence[str], config: Qwen2_5_VLConfig, pixels: int) -> VLMProcessor:
    """A processor whose tokenizer knows `words` as single tokens and spells everything else in bytes; it lower-cases.

    Args:
      config: of the model; its special token ids must be those of `vocabulary(words)`.
      pixels: of every image that the tower sees, when a prompt does not say otherwise.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vocab, merges = vocabulary(words)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    end, _, turn = SPECIAL[:3]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=turn, pad_token=end, chat_template=TEMPLATE, padding_side="left"
    )
    tower = config.vision_config
    pictures = Qwen2VLImageProcessorPil(
        patch_size=tower.patch_size,
        merge_size=tower.spatial_merge_size,
        temporal_patch_size=tower.temporal_patch_size,
        size=pixel_limits(pixels, pixels),
    )
    return VLMProcessor(config, fast, pictures)
