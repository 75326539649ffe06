"""What an author of a plugin writes: one test a property, collected by pytest."""

from grpo_ds.conformance import estimator_suite

TestMidpoint = estimator_suite("midpoint", scale=0.5)
