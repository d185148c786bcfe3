"""What everything else may use: JSON as its standard has it, and what it may hold. No JAX."""
