"""DeepGen 1.0 in PyTorch at a small size: transformers' Qwen2.5-VL, diffusers' transformer, and its own parts from torch.nn alone."""

import numpy as np
from kontext_reference import kontext_forward
from qwen_reference import IMAGE
from qwen_reference import SMALL as VLM

from unipic2_jax.models.deepgen.network import DecoderLoRAConfig, DeepGenConfig
from unipic2_jax.models.metaquery.connector import ConnectorConfig

# The tower sees two parts in four of an edge where the original has 28 in 32: pictures stay small.
SCALE = 0.5
SMALL = DeepGenConfig(
    num_queries=5,
    llm_hidden_size=64,
    pooled_projection_dim=20,
    joint_attention_dim=28,
    connector_config=ConnectorConfig(32, 48, num_hidden_layers=2, num_attention_heads=4),
    fused_layers=(2, 0, 1),
)
LORA = DecoderLoRAConfig.of(VLM, r=4, lora_alpha=8.0)


def randomised(model, torch, seed=0):
    """`model` with matrices that keep sizes and vectors about one half."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.5)
    return model.eval()


def connector(config, torch):
    """The part between language model and transformer, under the names of the training code; takes states of all layers."""
    nn, sizes = torch.nn, config.connector_config
    width, heads = sizes.hidden_size, sizes.num_attention_heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(width, width) for n in ("q", "k", "v", "out")})
            self.layer_norm1 = nn.LayerNorm(width, eps=sizes.layer_norm_eps)
            self.layer_norm2 = nn.LayerNorm(width, eps=sizes.layer_norm_eps)
            inner = sizes.intermediate_size
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

        def forward(self, x):
            normed = self.layer_norm1(x)
            q, k, v = (self.self_attn[f"{n}_proj"](normed).unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
            weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
            x = x + self.self_attn["out_proj"]((weights @ v).transpose(1, 2).flatten(2))
            hidden = nn.functional.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
            return x + self.mlp["fc2"](hidden)

    class Fusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.meta_queries = nn.Parameter(torch.zeros(config.num_queries, config.llm_hidden_size))
            self.projector_1 = nn.Linear(config.llm_hidden_size * len(config.fused_layers), width)
            self.connector = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(sizes.num_hidden_layers))})
            self.projector_2 = nn.Linear(width, config.pooled_projection_dim)
            self.projector_3 = nn.Linear(width, config.joint_attention_dim)

        def forward(self, hidden_states):
            x = self.projector_1(torch.cat([hidden_states[layer] for layer in config.fused_layers], dim=-1))
            for block in self.connector["layers"]:
                x = block(x)
            return self.projector_3(x), self.projector_2(x.mean(dim=1))

    return Fusion()


def language_model(torch, lora=None, seed=0):
    """transformers' model with attention that gives padding nothing; `lora`: with peft's adapter of these sizes, not zero."""
    from qwen_reference import reference

    model = reference(VLM, torch)
    model.set_attn_implementation("sdpa")
    if lora is not None:
        from peft import LoraConfig, inject_adapter_in_model

        names = [f"{part}.{name}" for part, name, *_ in lora.matrices()]
        targets = rf"model\.language_model\.layers\.\d+\.({'|'.join(names)})"
        options = {"init_lora_weights": "gaussian", "target_modules": targets}
        inject_adapter_in_model(LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, **options), model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn_like(p) * 0.5 * p.shape[-1] ** -0.5)
    return model.eval()


def switch_adapter(model, on):
    """Turns an adapter of `language_model` on or off."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(on)


def words(prompt, counts, tokenizer):
    """Token ids of a prompt with pictures of so many tokens each."""
    shown = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts)
    text = f"{shown}\n{prompt}" if counts else f"Generate an image: {prompt}"
    text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tower_patches(pixels, processor, torch, scale):
    """Pixels [3, H, W] in -1..1 to (patches, grid) as the tower takes them."""
    vision = processor.config.vision_config
    p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    small = torch.nn.functional.interpolate(pixels[None], scale_factor=scale, mode="bilinear")[0]
    colour = lambda values: torch.tensor(values).view(3, 1, 1)
    normed = ((small + 1) / 2 - colour(processor.image_processor.image_mean)) / colour(
        processor.image_processor.image_std
    )
    height, width = (edge // p for edge in normed.shape[1:])
    blocks = normed.view(3, height // m, m, p, width // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
    patches = blocks[..., None, :, :].expand(*blocks.shape[:5], t, p, p).reshape(height * width, -1)
    return patches, (1, height, width)


def condition(vlm, head, processor, prompts, pictures, torch, length=None, scale=SCALE):
    """(context, pooled) of prompts and, for each, its pictures [3, H, W] in -1..1; padded to the longest, or to `length`."""
    made = [[tower_patches(p, processor, torch, scale) for p in row] for row in pictures]
    merge = processor.config.vision_config.spatial_merge_size**2
    rows = [
        words(prompt, [int(np.prod(grid)) // merge for _, grid in row], processor.tokenizer)
        for prompt, row in zip(prompts, made, strict=True)
    ]
    length = length or max(map(len, rows))
    queries = head.meta_queries.shape[0]
    ids = torch.tensor([[processor.tokenizer.pad_token_id] * (length - len(row)) + row + [0] * queries for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * (len(row) + queries) for row in rows])
    embeddings = vlm.get_input_embeddings()(ids)
    embeddings[:, length:] = head.meta_queries
    grids = torch.tensor([grid for row in made for _, grid in row]) if any(made) else None
    if grids is not None:
        seen = vlm.model.visual(
            torch.cat([patches for row in made for patches, _ in row]), grid_thw=grids
        ).pooler_output
        embeddings[ids == IMAGE] = torch.cat(list(seen)) if isinstance(seen, (list, tuple)) else seen
    kinds = (ids == IMAGE).int()
    positions, _ = vlm.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask)
    out = vlm.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return head(out.hidden_states)


def velocity(transformer, latents, timestep, context, pooled, references):
    """The transformer's velocity; `references` [C, h, w] of one size each serve all rows (their order does not matter to it)."""
    rows = [reference.expand(len(latents), *reference.shape) for reference in references]
    return kontext_forward(transformer, latents, timestep, context, pooled, rows)
