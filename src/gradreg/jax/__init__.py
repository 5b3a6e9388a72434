"""The JAX engine: needs jax and nothing else."""
