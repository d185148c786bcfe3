"""Runs: configuration, the loop, checkpoints, metrics, reports, and a file for each kind of stage; it imports evaluation,
serving and what is below them.
"""
