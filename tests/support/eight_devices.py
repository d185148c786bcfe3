"""The environment of a process with eight simulated devices."""

import os
from pathlib import Path

# On a loaded machine a device's thread may reach a collective minutes after the others.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_cpu_collective_call_terminate_timeout_seconds=900",
)
# A collective that waits holds a thread. With no more threads than devices (the default) those of two collectives can hold all,
# and the device that both wait for has none left.
THREADS = "64"
ENVIRONMENT = os.environ | {
    "NPROC": THREADS,
    "XLA_FLAGS": " ".join([os.environ["XLA_FLAGS"], *FLAGS]),
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(str(Path(__file__).resolve().parents[up]) for up in (0, 2)),
}
