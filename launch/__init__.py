"""The command line. Only this package touches the environment, and it does so before jax is imported."""
