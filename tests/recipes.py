"""Options that many tests share."""

FROM_THE_ORIGINAL = ("scaling.estimator=absmean", "lam.curve=linear", "init.method=none", "optimizer.name=adamw")
"""A ramp that begins as the original does: for tests of all that is done at λ < 1, and for those that need no fit."""
