"""PyTorch models of `transformers` that look at pictures. They are optional: requirements-geneval.txt."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from unipic2_jax.rewards.base import RewardError, check_package


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
            raise ValueError(
                f"{what} is to run on '{device}', but PyTorch sees no GPU; use 'cpu', its CUDA build, or a "
                "reward of the kind 'remote' with the detector behind launch.serve_reward on a machine that has one."
            )


def own_device(device: str) -> str:
    """'cuda' as the GPU that this process computes on, of several on a node; a device with a number, and the CPU, as they are."""
    if device != "cuda":
        return device
    first = jax.local_devices()[0]
    number = first.local_hardware_id if first.platform == "gpu" else None
    return device if number is None else f"cuda:{number}"


@contextlib.contextmanager
def in_memory(what: str) -> Iterator[None]:
    """Raises a RewardError where the GPU has no memory left for what is done inside: scores are missing then, and the run goes on."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise RewardError(
            f"{what} does not fit the GPU's memory; lower its batch_size, leave PyTorch more (XLA_PYTHON_CLIENT_MEM_FRACTION), or let it "
            "run elsewhere (launch.serve_reward)."
        ) from error


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
