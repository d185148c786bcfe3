"""Where the time of one tiny picture goes, from the start of Python to the pixels, in seconds of wall time and of the CPU.

    python -m benchmarks.first_picture          # twice: the first call fills the compilation cache

The phases are those of `launch.generate`. The second picture of the process has the same programs and shows what is left without them.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

MARKS: list[tuple[str, float, float]] = []


def mark(what: str) -> None:
    """Ends the phase of this name."""
    spent = os.times()
    MARKS.append((what, time.time(), spent.user + spent.system))


def main() -> None:
    """Prints the table."""
    # Linux: when the machine was started, and how many ticks later this process was.
    began = time.time() - float(Path("/proc/uptime").read_text().split()[0])
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    MARKS.append(("", began + ticks / os.sysconf("SC_CLK_TCK"), 0.0))
    mark("Python")
    import jax

    mark("import jax")
    from unipic2_jax import pipelines
    from unipic2_jax.core.files import user_cache
    from unipic2_jax.models import bundle
    from unipic2_jax.parallel.compat import keep_programs

    mark("import the rest")
    keep_programs(user_cache("programs"), 0.0)
    folder = bundle.find_model(pipelines.TINY)
    family = bundle.family_of_folder(folder)
    configs = bundle.read_configs(folder)
    tokenizers = family.load_tokenizers(folder, configs, {})
    mark("transformers and tokenizers")
    modules = bundle.make_modules(configs, tokenizers, {}, None)
    jax.eval_shape(lambda key: bundle.init_params(*modules, key), jax.random.key(0))
    mark("shapes of the parameters, traced by Flax")
    pipe = pipelines.load()
    mark("all of loading once more, with weights")
    pipe("a red circle")
    mark("first picture: tracing, lowering, programs from the cache, 50 steps")
    pipe("a red circle")
    mark("second picture")
    print("| phase | wall, s | CPU, s |\n|---|---:|---:|")
    for (_, wall, cpu), (what, wall_then, cpu_then) in itertools.pairwise(MARKS):
        print(f"| {what} | {wall_then - wall:.2f} | {cpu_then - cpu:.2f} |")


if __name__ == "__main__":
    main()
