"""The mathematics of Miras: pure functions on arrays, JAX alone."""
