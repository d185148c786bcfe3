"""Tables of parameter names, safetensors in and out, checkpoints of our own, and precision; it imports flow, optim, parallel,
core and pictures.
"""
