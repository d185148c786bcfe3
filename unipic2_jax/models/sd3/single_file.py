"""The single-file layout of Stable Diffusion 3.5 (`sd3.5_medium.safetensors`) <-> one set of diffusers names per network.

The file differs from diffusers in names, in fused query-key-value matrices, in the order of scale and shift in the two
modulations that only scale and shift (of the last block's context and of the output), and in the 1x1 convolutions of
the autoencoder's attention. Facts from diffusers' `loaders/single_file_utils.py`. Both directions are lazy views.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from unipic2_jax.core.errors import closest
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.sd3.clip import CLIP_BIGG, CLIP_L, CLIPTextConfig
from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.models.sd3.t5 import T5Config
from unipic2_jax.models.sd3.vae import VAEConfig
from unipic2_jax.weights import table
from unipic2_jax.weights.variants import Variant

# Component -> prefixes of its names in the file (ours first when writing), and a name that is there if it is.
PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("text_encoders.clip_l.transformer.",),
    "text_encoder_2": ("text_encoders.clip_g.transformer.",),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
}
PROBES = {
    "transformer": "joint_blocks.0.x_block.attn.qkv.weight",
    "vae": "decoder.conv_in.weight",
    "text_encoder": "text_model.embeddings.token_embedding.weight",
    "text_encoder_2": "text_model.embeddings.token_embedding.weight",
    "text_encoder_3": "shared.weight",
}
# Numbers that some files carry beside the encoders and nothing here uses.
UNUSED = re.compile(r"text_encoders\.\w+\.logit_scale")
PROJECTION = "text_projection.weight"

TRANSFORMER_NAMES = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK_NAMES = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
QKV_NAMES = {
    **{f"attn.to_{x}": ("x_block.attn.qkv", i) for i, x in enumerate("qkv")},
    **{f"attn.add_{x}_proj": ("context_block.attn.qkv", i) for i, x in enumerate("qkv")},
    **{f"attn2.to_{x}": ("x_block.attn2.qkv", i) for i, x in enumerate("qkv")},
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a diffusers tensor lies: in `name`, as part `part` of `parts` equal ranges of rows.

    `swapped`: the two halves of the rows change places. `conv`: stored as a 1x1 convolution.
    """

    name: str
    part: int = 0
    parts: int = 1
    swapped: bool = False
    conv: bool = False


def transformer_piece(name: str, config: MMDiTConfig) -> Piece:
    """The place of a tensor of `SD3Transformer2DModel`."""
    stem, _, kind = name.rpartition(".")
    if name in TRANSFORMER_NAMES:
        return Piece(TRANSFORMER_NAMES[name])
    if stem in TRANSFORMER_NAMES:
        return Piece(f"{TRANSFORMER_NAMES[stem]}.{kind}", swapped=stem == "norm_out.linear")
    _, layer, inner = stem.split(".", 2)
    if inner in QKV_NAMES:
        fused, part = QKV_NAMES[inner]
        return Piece(f"joint_blocks.{layer}.{fused}.{kind}", part, 3)
    last = int(layer) == config.num_layers - 1
    swapped = last and inner == "norm1_context.linear"
    return Piece(f"joint_blocks.{layer}.{BLOCK_NAMES[inner]}.{kind}", swapped=swapped)


def vae_piece(name: str, config: VAEConfig) -> Piece:
    """The place of a tensor of `AutoencoderKL`."""
    count = len(config.block_out_channels)
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        half, layer, kind = match.groups()
        conv = layer != "group_norm" and kind == "weight"
        return Piece(f"{half}.mid.attn_1.{VAE_ATTENTION[layer]}.{kind}", conv=conv)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{count - 1 - int(m[1])}", name)
    name = re.sub(r"\.resnets\.(\d+)", r".block.\1", name)
    for theirs, ours in (
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        name = name.replace(theirs, ours)
    return Piece(name)


PIECES: dict[str, Callable[[str, Any], Piece]] = {
    "transformer": transformer_piece,
    "vae": vae_piece,
    **{name: lambda name, config: Piece(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")},
}


@dataclasses.dataclass(frozen=True)
class View:
    """Ranges of rows of lazy tensors, one after another, in another shape; read when indexed."""

    parts: tuple[tuple[Any, int, int], ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return table.promote(tensor.dtype for tensor, _, _ in self.parts)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = [tensor[slice(start, stop), ...] for tensor, start, stop in self.parts]
        array = rows[0] if len(rows) == 1 else np.concatenate([row.astype(self.dtype) for row in rows])
        return array.reshape(self.shape)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self[...]
        return array if dtype is None else array.astype(dtype)


def _halves(tensor: Any, swapped: bool) -> tuple[tuple[Any, int, int], ...]:
    rows = tensor.shape[0]
    return ((tensor, rows // 2, rows), (tensor, 0, rows // 2)) if swapped else ((tensor, 0, rows),)


class Views(dict):
    """Lazy tensors by diffusers name, and the file they come from."""

    def __init__(self, source: Any):
        super().__init__()
        self.source = source
        self.metadata = {"format": "pt"}

    def origin(self, name: str | None = None) -> str:
        """The file, for error messages."""
        return self.source.origin()


def prefixes(source: Iterable[str]) -> dict[str, str]:
    """The components that a file holds, with the prefix of their names."""
    names = set(source)
    by_component = {}
    for component, candidates in PREFIXES.items():
        for prefix in candidates:
            if prefix + PROBES[component] in names:
                by_component[component] = prefix
                break
    return by_component


def split(
    source: Variant, wanted: Mapping[str, Iterable[str]], configs: Mapping[str, ModelConfig]
) -> tuple[dict[str, Views], list[str], list[str]]:
    """Diffusers-named views of the networks in a single file.

    Args:
      source: the file's tensors.
      wanted: component -> diffusers names that its network needs, and that it may carry unused.
      configs: component -> config.

    Returns:
      (component -> views; names of the file that nothing uses; names that the file lacks and that were filled in).

    Raises ValueError in one sentence for a missing or an extra tensor.
    """
    prefix_of, used, filled, out = prefixes(source), set(), [], {}
    for component, names in wanted.items():
        views = Views(source)
        for name in names:
            piece = PIECES[component](name, configs[component])
            stored = prefix_of[component] + piece.name
            if stored not in source:
                if component == "text_encoder" and name == PROJECTION:
                    # Files made for other tools leave CLIP-L's projection out and mean the identity.
                    like = source[prefix_of[component] + PROBES[component]].dtype
                    views[name] = np.eye(cast(CLIPTextConfig, configs[component]).projection_dim, dtype=like)
                    filled.append(f"{component}/{name}")
                    continue
                near = closest(stored, source)
                raise ValueError(f"{source.origin()} lacks the tensor {stored!r}{near}.")
            used.add(stored)
            views[name] = _view(source[stored], piece)
        out[component] = views
    unused = [name for name in source if name not in used and UNUSED.fullmatch(name)]
    if extra := sorted(set(source) - used - set(unused)):
        known = [prefix_of[c] + PIECES[c](name, configs[c]).name for c, names in wanted.items() for name in names]
        raise ValueError(
            f"{source.origin()} holds the tensor {extra[0]!r} among {len(extra)} that this layout does not have"
            f"{closest(extra[0], known)}."
        )
    return out, unused, filled


def _view(tensor: Any, piece: Piece) -> View:
    rows = tensor.shape[0] // piece.parts
    if piece.parts == 1:
        shape = tuple(tensor.shape)
        # Left as it is when it is no 1x1 convolution, for the shape check to name it.
        shape = shape[:2] if piece.conv and shape[2:] == (1,) * (len(shape) - 2) else shape
        return View(_halves(tensor, piece.swapped), shape)
    start = piece.part * rows
    return View(((tensor, start, start + rows),), (rows, *tensor.shape[1:]))


def join(
    sources: Mapping[str, Mapping[str, Any]],
    configs: Mapping[str, ModelConfig],
    prefix_of: Mapping[str, str] | None = None,
    filled: Iterable[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of the single file, from each component's diffusers-named lazy tensors.

    Args:
      sources: component -> tensors. configs: component -> config.
      prefix_of: component -> prefix; None takes the usual ones.
      filled: 'component/name' of tensors to leave out.
    """
    filled = set(filled)
    for component, source in sources.items():
        prefix = (prefix_of or {}).get(component, PREFIXES[component][0])
        groups: dict[str, list[tuple[Piece, str]]] = {}
        for name in source:
            if f"{component}/{name}" not in filled:
                piece = PIECES[component](name, configs[component])
                groups.setdefault(piece.name, []).append((piece, name))
        for stored, members in groups.items():
            members.sort(key=lambda member: member[0].part)
            parts = tuple(part for piece, name in members for part in _halves(source[name], piece.swapped))
            shape = (sum(stop - start for _, start, stop in parts), *parts[0][0].shape[1:])
            shape += (1, 1) if members[0][0].conv else ()
            yield prefix + stored, np.asarray(View(parts, shape)[...])


def read_config(component: str, source: Mapping[str, Any]) -> ModelConfig:
    """A component's config from the shapes in a single file.

    What shapes do not tell (sample size, activation, CLIP's head width, the latent's scale) is as in SD3.5.
    """
    prefix = prefixes(source)[component]
    shapes = {name.removeprefix(prefix): tuple(source[name].shape) for name in source if name.startswith(prefix)}
    return _READERS[component](shapes)


def _count(shapes: Iterable[str], pattern: str) -> int:
    return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)


def _transformer(shapes: Mapping[str, tuple[int, ...]]) -> MMDiTConfig:
    width, joint = shapes["context_embedder.weight"]
    _, channels, patch, _ = shapes["x_embedder.proj.weight"]
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm[0] if norm else 64
    return MMDiTConfig(
        patch_size=patch,
        in_channels=channels,
        num_layers=_count(shapes, r"joint_blocks\.(\d+)\."),
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=joint,
        caption_projection_dim=width,
        pooled_projection_dim=shapes["y_embedder.mlp.0.weight"][1],
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
        dual_attention_layers=tuple(range(_count(shapes, r"joint_blocks\.(\d+)\.x_block\.attn2\."))),
        qk_norm="rms_norm" if norm else None,
    )


def _vae(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    count = _count(shapes, r"encoder\.down\.(\d+)\.")
    widths = tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(count))
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=widths,
        layers_per_block=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        norm_num_groups=math.gcd(32, *widths),
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
    )


def _clip(shapes: Mapping[str, tuple[int, ...]], like: CLIPTextConfig) -> CLIPTextConfig:
    vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
    return dataclasses.replace(
        like,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=shapes.get(PROJECTION, (width,))[0],
        num_hidden_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
    )


def _t5(shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
    vocab, width = shapes["shared.weight"]
    first = "encoder.block.0.layer"
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    return T5Config(
        vocab_size=vocab,
        d_model=width,
        d_kv=shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
        d_ff=shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0],
        num_layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


_READERS: dict[str, Callable[[Mapping[str, tuple[int, ...]]], ModelConfig]] = {
    "transformer": _transformer,
    "vae": _vae,
    "text_encoder": lambda shapes: _clip(shapes, CLIP_L),
    "text_encoder_2": lambda shapes: _clip(shapes, CLIP_BIGG),
    "text_encoder_3": _t5,
}
