"""Shrunken Qwen2.5-VL models of transformers, and batches of prompts with images for them."""

import numpy as np

from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.models.qwen.vision import Qwen2_5_VLVisionConfig

IMAGE, VIDEO, START, END = 110, 111, 112, 113
# Windows of 2 x 2 merged tokens, so that small images fill some and overlap the edge of others.
VISION = Qwen2_5_VLVisionConfig(
    depth=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    patch_size=4,
    tokens_per_second=4,
    window_size=16,
    out_hidden_size=64,
    fullatt_block_indexes=(1, 3),
)
SMALL = Qwen2_5_VLConfig(
    vocab_size=120,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(2, 3, 3),
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    vision_config=VISION,
)


def reference(config, torch, gain=1.0):
    """transformers' model of these sizes with weights of size one in every tensor, matrices `gain` times that."""
    from transformers import Qwen2_5_VLConfig as HFConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

    model = HFModel(HFConfig(**config.to_dict(), attn_implementation="eager"))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn_like(p) * (gain * fan_in**-0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.5)
    return model.eval()


def tensors(model):
    """The model's tensors under the names that transformers gives them in memory, without tied copies."""
    named = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        named.pop("lm_head.weight", None)
    return named


def batch(config, rows, seed=0):
    """Prompts with images, padded on the left.

    Args:
      rows: one list a prompt, of numbers (that many words) and of (placeholder id, frames, height, width) in patches.

    Returns ids and valid [B, T], and {placeholder id: (patches, grids)}.
    """
    rng, tower = np.random.default_rng(seed), config.vision_config
    media, prompts = {}, []
    for row in rows:
        ids = []
        for item in row:
            if isinstance(item, int):
                ids += rng.integers(0, IMAGE, item).tolist()
                continue
            token, *grid = item
            count = int(np.prod(grid))
            ids += [START, *[token] * (count // tower.merged), END]
            media.setdefault(token, ([], []))
            media[token][0].append(rng.standard_normal((count, tower.patch_dim)).astype(np.float32))
            media[token][1].append(grid)
        prompts.append(ids)
    length = max(map(len, prompts))
    ids = np.array([[0] * (length - len(p)) + p for p in prompts], np.int32)
    valid = np.arange(length)[None] >= length - np.array([len(p) for p in prompts])[:, None]
    return ids, valid, {k: (np.concatenate(p), np.array(g)) for k, (p, g) in media.items()}


TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def processor(config):
    """A tokenizer of single characters with Qwen's special tokens and a template like its own, and an image processor."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from unipic2_jax.models.qwen.processor import VLMProcessor, pixel_limits

    words = [chr(i) for i in range(32, 127)] + ["\n"]
    vocab = {word: i for i, word in enumerate(words)}
    special = {"<|im_start|>": 100, "<|im_end|>": 101, "<|endoftext|>": 102, "<unk>": 103}
    special |= {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
    for i in range(END + 1):
        if i not in {**vocab, **special}.values():
            vocab[f"<unused{i}>"] = i
    tokenizer = Tokenizer(models.WordLevel({**vocab, **special}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(list(special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tower = config.vision_config
    pictures = Qwen2VLImageProcessorPil(
        patch_size=tower.patch_size,
        merge_size=tower.spatial_merge_size,
        temporal_patch_size=tower.temporal_patch_size,
        size=pixel_limits(64, 1024),
    )
    return VLMProcessor(config, fast, pictures)
