"""Objectives: a class with knobs, called as `objective(model, batch, key)`, gives `(loss: Mean, metrics)`.

The step differentiates `loss.total` and divides by `loss.weight`, summed over micro-batches. With key None the call is
an evaluation: no dropout, no noise. Every objective says which fields of the batch it reads.
"""
