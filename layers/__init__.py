"""Architecture parts as plain Flax modules: nothing here knows gin, a mesh, a file or a training loop."""
