"""What every command shares: mistakes of the person at the keyboard are one sentence on stderr, not a traceback."""

from __future__ import annotations

import contextlib
import ctypes
import logging as python_logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from unipic2_jax.parallel import xla

OURS = tuple(
    str(Path(__file__).resolve().parents[1] / name) for name in ("unipic2_jax", "launch", "convert", "configs")
)

flags.DEFINE_bool("traceback", False, "Show the full traceback of an error that would otherwise be one sentence.")

flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder where compiled programs are kept for the next start; empty: nowhere. By default $JAX_COMPILATION_CACHE_DIR, else "
    "~/.cache/unipic2_jax/programs.",
)


def lora_flag() -> flags.FlagHolder[list[str]]:
    """--lora, of commands that use a model."""
    return flags.DEFINE_list(
        "lora", [], "LoRA on the model: file, folder or hub id, and :SCALE if not 1; several with commas between them."
    )


def dtype_flag() -> flags.FlagHolder[str | None]:
    """--dtype, of commands that draw or answer."""
    return flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "Of weights and arithmetic; bfloat16 if not given, and float32 on a CPU.",
    )


def solver_flag() -> flags.FlagHolder[str]:
    """--solver, of commands that draw."""
    return flags.DEFINE_enum(
        "solver", "euler", ["euler", "dpm2", "unipc"], "Of the sampling; the last two are of second order."
    )


def interval_flag() -> flags.FlagHolder[list[str] | None]:
    """--guidance_interval, of commands that draw; its values are `numbers`."""
    return flags.DEFINE_list(
        "guidance_interval", None, "LOW,HIGH: guidance between these noise levels alone (1: noise, 0: the picture)."
    )


def numbers(name: str, values: Sequence[str] | None) -> tuple[float, ...] | None:
    """The numbers of a flag that is a list, or None where it is not given.

    Raises:
      ValueError: when one is no number.
    """
    try:
        return None if values is None else tuple(map(float, values))
    except ValueError:
        raise ValueError(f"--{name} is {','.join(values)}; write numbers with commas between them.") from None


def resident_flag() -> flags.FlagHolder[str]:
    """--resident, of commands that draw."""
    return flags.DEFINE_enum(
        "resident",
        "all",
        ["all", "transformer"],
        "Networks that stay on the device: all, or the transformer alone, the others while they are used.",
    )


def quiet() -> None:
    """Keeps libraries from telling what they did not find (accelerators, PyTorch); call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.set_verbosity(logging.WARNING)


def tell_compiler(choice: str = "recipe") -> None:
    """Where there is an NVIDIA GPU, gives XLA's compiler the flags of `parallel.xla`; call it before anything is compiled.

    Elsewhere nothing: libtpu ends the process at a flag that is not its own.
    """
    if (find_accelerator() or ("",))[0] == "gpu":
        xla.set_gpu_flags(choice)


class _AboveTheBar(python_logging.Handler):
    """Lines above a progress bar instead of through it."""

    def emit(self, record: python_logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def show_log() -> None:
    """Shows what this project logs, such as which kernel computes attention and why."""
    logger = python_logging.getLogger("unipic2_jax")
    logger.setLevel(python_logging.INFO)
    logger.propagate = False
    logger.handlers = [_AboveTheBar()]


def keep_freed_memory() -> None:
    """Where JAX has nothing but a CPU, and the C library is glibc: what XLA frees stays with the process.

    Every execution of a compiled program asks for its temporary memory anew, and the system clears what it gives page by page,
    which can take as long as a training step's arithmetic (docs/performance.md). Call it in a process of its own and before JAX
    looks for devices, which is when it starts its threads. Hosts of accelerators are left alone: their many threads would wait
    for each other in the one arena that large blocks need.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if change is None or not _has_only_cpus():
        return
    # Of glibc's malloc.h: no block is mapped for itself, nothing is given back, and threads share the arena that can grow.
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (arena_max, 1)):
        change(parameter, value)


def _has_only_cpus() -> bool:
    """Whether JAX will find no accelerator: it asks the plugins that are installed, unless $JAX_PLATFORMS says which."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not (entry_points(group="jax_plugins") or find_spec("jax_plugins") or find_spec("libtpu"))


# An accelerator -> (what people call it, the packages of which one makes JAX see it, the file that installs one).
PLUGINS = {
    "gpu": ("an NVIDIA GPU", ("jax-cuda13-plugin", "jax-cuda12-plugin"), "requirements-cuda.txt"),
    "tpu": ("a TPU", ("libtpu",), "requirements-tpu.txt"),
}
# Weights of so many bytes train on a CPU without anybody waiting.
SMALL = 1e9
# What the hosts of Cloud TPUs are given.
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")


def find_accelerator(
    root: Path = Path("/"), environment: Mapping[str, str] = os.environ, which: Callable[[str], Any] = shutil.which
) -> tuple[str, str] | None:
    """(a key of `PLUGINS`, what shows it) of an accelerator that the system says is in this machine, or None."""
    for path in ("dev/nvidia0", "proc/driver/nvidia"):
        if (root / path).exists():
            return "gpu", f"/{path}"
    if which("nvidia-smi"):
        return "gpu", "nvidia-smi"
    for path in ("dev/accel0", "dev/vfio/0"):
        if (root / path).exists():
            return "tpu", f"/{path}"
    return next((("tpu", f"${name}") for name in TPU_VARIABLES if environment.get(name)), None)


def is_small(model: str, folders: Sequence[str | None]) -> bool:
    """Whether a run is made for a CPU: its `config.model` is a tiny one, or the folders that it starts from hold little."""
    here = [Path(folder) for folder in folders if folder and Path(folder).is_dir()]
    files = [file for folder in here for file in folder.rglob("*.safetensors")]
    return model.startswith("tiny") or (bool(files) and sum(file.stat().st_size for file in files) < SMALL)


def unused_accelerator(
    model: str, folders: Sequence[str | None], platform: str, platforms: str | None, accelerator: tuple[str, str] | None
) -> str | None:
    """Why a run is not to begin on a CPU, in one sentence; None: it may begin.

    Args:
      model, folders: see `is_small`.
      platform: that JAX chose; platforms: that it was told to take, as by $JAX_PLATFORMS, or None.
      accelerator: of `find_accelerator`.
    """
    if platform != "cpu" or platforms or accelerator is None or is_small(model, folders):
        return None
    kind, shown = accelerator
    name, packages, requirements = PLUGINS[kind]
    why = f"the package {packages[0]} is missing; install it with `pip install -r {requirements}`"
    if installed := next((package for package in packages if _is_installed(package)), None):
        why = (
            f"the package {installed} is there but does not reach it; see what `python -c 'import jax; jax.devices()'` "
            f"says, or install it anew with `pip install -r {requirements}`"
        )
    return (
        f"The model '{model}' would train on the CPU, since JAX does not see {name} that is in this machine ({shown}): {why}, "
        "or set JAX_PLATFORMS=cpu to train on the CPU all the same."
    )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def is_user_error(error: BaseException) -> bool:
    """Whether `error` is about what the user passed: a file-system error, or a ValueError that this project raised.

    A ValueError from inside a library is a bug of ours and keeps its traceback.
    """
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and frames[-1].filename.startswith(OURS)


def keep_programs() -> None:
    """Compiled programs are kept for the next start, in the folder of --compilation_cache; see there."""
    if (named := flags.FLAGS.compilation_cache) == "":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    elif named is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = named
    import jax

    from unipic2_jax.core.files import user_cache
    from unipic2_jax.parallel import compat

    if named == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if named is not None:
        jax.config.update("jax_compilation_cache_dir", named)
    # A picture of a small model needs many programs that take a tenth of a second.
    compat.keep_programs(user_cache("programs"), 0.0)


def run(
    main: Callable[[Sequence[str]], Any],
    prepare: Callable[[Sequence[str]], None] | None = None,
    *,
    compiles: bool = True,
) -> None:
    """Runs `main(argv)` under absl; an error of input ends with its sentence on stderr and exit code 2.

    Args:
      prepare: called with the command line before it is parsed, to define flags that depend on it.
      compiles: whether it compiles programs that it runs, which are then kept.
    """

    def guarded(argv: Sequence[str]) -> None:
        with _sentences():
            if len(argv) > 1:
                raise ValueError(f"Unexpected argument {argv[1]!r}: every value needs its flag; see --help.")
            if compiles:
                keep_programs()
            main(argv)

    def parse(argv: Sequence[str]) -> list[str]:
        with _sentences():
            prepare(argv)
        return app.parse_flags_with_usage(argv)

    app.run(guarded, flags_parser=parse if prepare else app.parse_flags_with_usage)


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Ends the process where what the user passed is wrong, with the sentence that says so."""
    quiet()
    tell_compiler()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        if (flags.FLAGS.is_parsed() and flags.FLAGS.traceback) or not is_user_error(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
