"""How a model is measured, what two measurements say about each other, and the benchmarks; it imports rl, pipelines and what is
below them.
"""
