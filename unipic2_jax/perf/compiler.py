"""What a compiler says of a program, and the small files that remember it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.core.files import user_cache, write_text
from unipic2_jax.parallel.compat import core
from unipic2_jax.parallel.xla import gpu_options
from unipic2_jax.perf.counting import inner_jaxprs
from unipic2_jax.perf.hlo import Module
from unipic2_jax.perf.movers import movers
from unipic2_jax.perf.topology import Topology

# How hard the compiler for TPUs tries, by name. 'quick' takes a quarter of its time and about the same memory: what it leaves out are
# searches for faster code, so that more bytes are moved than in a run.
EFFORTS: dict[str, dict[str, Any]] = {"quick": {"jax_optimization_level": "O0"}, "run": {}}

# How the compiler says that a program is too large, in units of GiB or MiB.
_TOO_LARGE = re.compile(r"temporaries \(([\d.]+)([KMG])\) exceeds|Used ([\d.]+)([KMG]) of")


_ADDRESS = re.compile(r'backend_config = "\d+"')


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


# Packages that hold compilers.
COMPILERS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


CACHE_FORMAT = 7  # of what is kept between plans


class Cache:
    """What compiled programs were found to take, in small files; without a folder nothing is kept. `effort` is one of EFFORTS."""

    def __init__(self, folder: str | os.PathLike | None, effort: str = "quick"):
        self.folder, self.effort = Path(folder) if folder else None, effort

    def key(self, text: str, topology: Topology, flags: str) -> str:
        """The key of a lowered program and everything else that decides how it is compiled."""
        libraries = [f"{name} {_version(name)}" for name in ("jax", "jaxlib", *COMPILERS)]
        options = gpu_options(flags) if not topology.is_tpu else EFFORTS[self.effort]
        parts = [str(CACHE_FORMAT), str(topology), json.dumps(options), *libraries, text]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key."""
        path = self.folder and self.folder / f"{key}.json"
        return json.loads(path.read_text()) if path and path.is_file() else None

    def write(self, key: str, said: Mapping[str, Any]) -> None:
        """Keeps it. Another plan may be reading: the file appears whole."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{key}.json", json.dumps(said))


def default_cache() -> Path:
    """Beside JAX's own cache where the environment names one, else in the user's."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(named) / "plans" if named else user_cache("plans")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@contextlib.contextmanager
def _settings(values: Mapping[str, Any]) -> Iterator[None]:
    """JAX's settings inside; as options of a program they are spelled differently by every version of it."""
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def compile_program(
    traced: jax.stages.Traced,
    mesh: Mesh,
    topology: Topology,
    cache: Cache,
    log: Callable[[str], None],
    flags: str = "recipe",
) -> dict[str, Any]:
    """What the compiler says of a program: bytes of its 'arguments', 'results', 'temporary', 'moved', 'collectives' and 'ports',
    its 'movers' (`perf.movers`) and its 'kernels'.

    'moved' and 'collectives' are None where it is too large to be compiled; 'temporary' is then what it would have needed.

    Args:
      flags: `config.xla_flags`, which a run compiles with as well.

    Raises:
      ConfigError: when JAX does not understand what the compiler made.
    """
    lowered = traced.lower()
    # Kernels that are split by a rule of their own stand in the text as the address of that rule, which differs from process to
    # process; what they are asked for stands in the jaxpr.
    asked = sorted({str(sorted(eqn.params.items(), key=str)) for eqn in _attention_calls(traced.jaxpr.jaxpr)})
    key = cache.key("\n".join([_ADDRESS.sub("", lowered.as_text()), *asked]), topology, flags)
    if said := cache.read(key):
        log("kept from before")
        return said
    started = time.perf_counter()
    try:
        with _settings(EFFORTS[cache.effort] if topology.is_tpu else {}):
            compiled = lowered.compile(compiler_options=None if topology.is_tpu else gpu_options(flags))
    except jax.errors.JaxRuntimeError as error:
        if not (too_large := _TOO_LARGE.search(str(error))):
            raise
        number, unit = [x for x in too_large.groups() if x]
        said = {
            "arguments": None,
            "results": None,
            "temporary": float(number) * _UNITS[unit],
            "moved": None,
            "collectives": None,
            "ports": 0.0,
            "kernels": {},
            "movers": [],
        }
    else:
        memory, module = compiled.memory_analysis(), _module(compiled)
        nodes = [] if topology.is_tpu else [device.process_index for device in mesh.devices.flat]
        said = {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            # The program itself lies in the same memory.
            "temporary": memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
            "moved": module.moved_bytes(),
            "collectives": module.collective_bytes(nodes),
            "ports": module.port_bytes(nodes),
            "kernels": module.kernels(),
            "movers": movers(module),
        }
    seconds = time.perf_counter() - started
    log(f"compiled in {seconds:.0f} s" + (", too large" if said["moved"] is None else ""))
    cache.write(key, said)
    return said


def _attention_calls(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("dot_product_attention"):
            yield eqn
        for inner in inner_jaxprs(eqn.params.values()):
            yield from _attention_calls(inner)


def _module(compiled: jax.stages.Compiled) -> Module:
    try:
        return Module.read(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"jaxlib {_version('jaxlib')} cannot read a program that libtpu {_version('libtpu')} compiled; install the libtpu "
            f"that belongs to it: pip install 'jax[tpu]=={_version('jax')}'."
        ) from error
