"""Settings of all tests."""

import os

# Tests compile many small programs and run each of them once or twice: without the backend's optimisations that takes about
# a third less time. It must be set before JAX is imported; commands that tests start inherit it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
