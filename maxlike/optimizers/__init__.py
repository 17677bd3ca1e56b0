"""Optimizers: a class with knobs, called as `optimizer(axes, clock)`, gives an `optax.GradientTransformation`.

`axes` is the tree of logical axes of the parameters (nested dicts, a tuple of names at each parameter): groups are made
from it alone, never from parameter names. `optimizer.schedule(clock)(count)` is the learning rate at an update;
`optimizer.describe(axes)` says what happens to each parameter. Everything kept in a parameter's shape lies in a tree
shaped like the parameters, so it takes their shardings. Clipping and averaging belong to the step.
"""
