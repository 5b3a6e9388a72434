"""The JAX engine: needs jax and nothing else."""

from gradreg.extras import needing

with needing("gradreg.jax", "jax"):
    from gradreg.jax.decoupled import decoupled_update
    from gradreg.jax.microbatches import microbatched
    from gradreg.jax.regularizer import grad, value_and_grad

__all__ = ["decoupled_update", "grad", "microbatched", "value_and_grad"]
