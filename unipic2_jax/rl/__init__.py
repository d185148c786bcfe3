"""Reinforcement: the algorithms, how they sample and how rewards become advantages; it imports rewards and what is below them."""
