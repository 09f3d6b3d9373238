"""This package in the tools that others measure with. Import what you need: each module needs the tool that it is for.

``kvpress``: its presses before this compression, and this compression as one of its presses. ``lm_eval``: a model of
lm-evaluation-harness.
"""
