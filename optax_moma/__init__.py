"""optax_moma."""
