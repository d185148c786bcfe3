"""What every base model shares, and a folder for each family: network, names, conditioner, LoRA, FLOPs; it imports weights, data
and what is below them.
"""
