"""PyTorch models of `transformers` that look at pictures. They are optional: requirements-geneval.txt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unipic2_jax.rewards.base import check_package


def check_torch(device: str, what: str) -> None:
    """Whether PyTorch is there and has this device: 'cpu', 'cuda', 'cuda:1'.

    Raises:
      ValueError: when it has not.
    """
    check_package("torch", "requirements-geneval.txt", what)
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"{what} runs on 'cpu' or 'cuda', not on '{device}'; choose one of them.")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"{what} is to run on '{device}', but PyTorch sees no GPU; use 'cpu' or its CUDA build.")


def check_folder(model: str, what: str) -> None:
    """Whether a local folder, where one is meant, is there; a hub id is looked up when it is loaded.

    Raises:
      FileNotFoundError: when it is not.
    """
    if (os.path.isabs(model) or model.startswith(".")) and not Path(model).is_dir():
        raise FileNotFoundError(f"The folder {model} for {what} does not exist; check the path.")


def load_part(kind: Any, model: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder or hub id.

    Raises:
      ValueError: with the reason in the library's words.
    """
    try:
        return kind.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{kind.__name__} cannot be loaded from {model} ({reason}); give a folder or hub id that holds it."
        ) from error


def load_network(kind: Any, model: str, device: str) -> Any:
    """A network for inference, float32, on the device; of weights, only safetensors are read."""
    import torch

    return load_part(kind, model, use_safetensors=True, dtype=torch.float32).eval().to(device)


def load_processor(model: str) -> Any:
    """The network's image processor; on PIL, as the original evaluation, and so without torchvision."""
    from transformers import AutoImageProcessor

    return load_part(AutoImageProcessor, model, backend="pil")
