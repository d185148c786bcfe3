"""Optimizers, schedules of their rates, and the moving average; it imports core."""
