"""What a model makes of prepared pictures and prompts, computed once instead of in every step of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.sampling import encode_moments, from_uint8
from unipic2_jax.parallel.mesh import batch_shards, make_mesh, shard_batch

STORES = ("latents", "conditioning")
DTYPES = ("float16", "float32")


class ModelEncoder:
    """Encodes batches for `data.prepare.prepare`, split over the devices of this process.

    'latents' gives the VAE's moments, from which training draws samples or takes modes: 'mean' and 'logvar' [B, h, w, C],
    and of references 'reference_mean' and 'reference_logvar' [B, R, h, w, C]. They are as the VAE gives them: not
    normalised. 'conditioning' gives the conditioner's 'context' [B, S, J] and 'pooled' [B, P] of the prompts, and for a
    conditioner that sees images of the references, too.

    Attributes:
      settings, batch_size, multiple: see `data.prepare.Encoder`.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: Sequence[str],
        *,
        name: str = "",
        dtype: str = "float16",
        batch_size: int = 16,
        mesh: Mesh | None = None,
    ):
        """Args:
          store: some of `STORES`.
          name: of the model, for `settings`: a folder or hub id.
          dtype: of the arrays, one of `DTYPES`; the model's own decides the arithmetic.
          batch_size: of a program; rounded up to a multiple of the devices.
          mesh: where `bundle` is; None: all devices.

        Raises:
          ValueError: for an unknown store or dtype, or none.
        """
        if unknown := [kind for kind in store if kind not in STORES]:
            raise ValueError(f"A model cannot store {unknown[0]!r}; choose from {', '.join(STORES)}.")
        if not store:
            raise ValueError(f"There is a model but nothing to store; choose from {', '.join(STORES)}.")
        if dtype not in DTYPES:
            raise ValueError(f"Arrays cannot be stored as {dtype!r}; choose one of {', '.join(DTYPES)}.")
        if batch_size < 1:
            raise ValueError(f"The batch size is {batch_size}; give at least 1.")
        self.bundle, self.dtype = bundle, np.dtype(dtype)
        self.store = [kind for kind in STORES if kind in store]
        self.mesh = make_mesh() if mesh is None else mesh
        devices = batch_shards(self.mesh)
        self.batch_size = -(-batch_size // devices) * devices
        self.multiple = bundle.patch_pixels
        self.settings = {
            "model": name,
            "model_dtype": np.dtype(bundle.vae.dtype).name,
            "store": self.store,
            "dtype": dtype,
            "batch_size": self.batch_size,
        }
        self._moments = jax.jit(lambda params, pixels: encode_moments(bundle.vae, params, from_uint8(pixels)))
        self._condition = jax.jit(bundle.conditioner.apply)

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """See `data.prepare.Encoder`.

        Raises:
          ValueError: a value that does not fit the dtype, or a prompt that the conditioner refuses.
        """
        count = len(pixels)
        # Always the same shapes, so that there is one program for a bucket; the last example stands for those missing.
        rows = np.minimum(np.arange(self.batch_size), count - 1)
        pixels, prompts = pixels[rows], [prompts[row] for row in rows]
        arrays: dict[str, Any] = {}
        if "latents" in self.store:
            arrays |= self._latents(pixels)
        if "conditioning" in self.store:
            arrays |= self._conditioning(pixels, prompts)
        return {name: self._stored(name, np.asarray(values)[:count]) for name, values in arrays.items()}

    def _latents(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        batch, pictures = pixels.shape[:2]
        flat = shard_batch(pixels.reshape(-1, *pixels.shape[2:]), self.mesh)
        moments = self._moments(self.bundle.params["vae"], flat)
        mean, logvar = (np.asarray(m).reshape(batch, pictures, *m.shape[1:]) for m in moments)
        arrays = {"mean": mean[:, 0], "logvar": logvar[:, 0]}
        return arrays if pictures == 1 else arrays | {"reference_mean": mean[:, 1:], "reference_logvar": logvar[:, 1:]}

    def _conditioning(self, pixels: np.ndarray, prompts: Sequence[str]) -> dict[str, jax.Array]:
        try:
            tokens = self.bundle.conditioner.tokenize(prompts, [list(row[1:]) for row in pixels])
        except ValueError as error:
            raise ValueError(
                f"The conditioner refuses one of the prompts from {prompts[0]!r:.80} to {prompts[-1]!r:.80} "
                f"({str(error).rstrip('.')}); lower max_prompt or take it out of the source."
            ) from error
        context, pooled = self._condition(self.bundle.params["conditioner"], shard_batch(tokens, self.mesh))
        return {"context": context, "pooled": pooled}

    def _stored(self, name: str, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # reported below, as an error
            stored = values.astype(self.dtype)
        if not np.isfinite(stored).all():
            what = "holds values that are not finite" if not np.isfinite(values).all() else f"does not fit {self.dtype}"
            raise ValueError(f"The model's {name} {what}; use float32 for the arrays, and for the model.")
        return stored
