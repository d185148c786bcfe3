"""The device mesh, what lies where on it, runs of several processes, and the names that a JAX or Orbax release changes; it
imports core.
"""
