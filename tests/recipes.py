"""Options that many tests share."""

FROM_THE_ORIGINAL = (
    "scaling.estimator=absmean",
    "lam.curve=linear",
    "init.method=none",
    "distill.kl=0.65",
    "distill.ce=0.35",
    "optimizer.name=adamw",
)
"""A ramp that begins as the original does: for tests of all that is done at λ < 1, and for those that need no fit."""
