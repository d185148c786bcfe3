"""The mathematics of flow matching: path, loss, noise levels, ODE and SDE steps, guidance; it imports core."""
