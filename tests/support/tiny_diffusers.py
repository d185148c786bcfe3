"""A random SD3 in the originals' own classes, small enough for tests, saved by their own `save_pretrained`."""

import json

CHANNELS, JOINT = 4, 32


def transformer(torch, layers=3, dual=(0, 1)):
    """Its two modulations, norms and biases are random too: at their initial values a mix-up would not show."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=CHANNELS,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        out_channels=CHANNELS,
        pos_embed_max_size=6,
        dual_attention_layers=tuple(dual),
        qk_norm="rms_norm",
    )
    return randomize(torch, model)


def randomize(torch, model):
    """Every parameter drawn anew, at a size that keeps activations near one."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1) * 0.5)
    return model.eval()


def vae(torch):
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return randomize(torch, model)


def clip(torch, width):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=20,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return randomize(torch, CLIPTextModelWithProjection(config))


def t5(torch):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    config = T5Config(
        vocab_size=40, d_model=JOINT, d_kv=4, d_ff=20, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return randomize(torch, T5EncoderModel(config))


def save(torch, folder, dtype="float32", shard="10GB"):
    """The folder of a pipeline: five networks, model_index.json, a scheduler, and a stand-in for tokenizer files."""
    cast = lambda model: model.to(getattr(torch, dtype))
    cast(transformer(torch)).save_pretrained(folder / "transformer", max_shard_size=shard)
    cast(vae(torch)).save_pretrained(folder / "vae", max_shard_size=shard)
    texts = {"text_encoder": clip(torch, 8), "text_encoder_2": clip(torch, 16), "text_encoder_3": t5(torch)}
    for name, model in texts.items():
        cast(model).save_pretrained(folder / name, max_shard_size=shard)
    index = {"_class_name": "StableDiffusion3Pipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {"transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {name: ["transformers", type(model).__name__] for name, model in texts.items()}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("tokenizer/vocab.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps({"shift": 3.0}))
    return folder
