"""UniPic 2.0 in JAX: networks, flow matching, reinforcement, conversion."""
