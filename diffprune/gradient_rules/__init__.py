"""Rules: what a torch function's use of a weight adds to each sample's gradient. `docs/per_sample.md` adds one.

A rule has the function's own signature behind a `Recorder` and the function. It runs the function, and records with
the output how the weight's part follows from what is kept and from the output's gradient.
"""

from diffprune.gradient_rules import broadcasts, convolutions, matrices, normalisations, tables
from diffprune.gradient_rules.registry import RULES, elementwise, rule

__all__ = ["RULES", "broadcasts", "convolutions", "elementwise", "matrices", "normalisations", "rule", "tables"]
