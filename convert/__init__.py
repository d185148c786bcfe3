"""Doors between PyTorch and this project; they may import everything but launch, of which they share the command line
(launch.cli).
"""
