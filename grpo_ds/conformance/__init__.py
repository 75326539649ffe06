"""Is an estimator sound? A table of properties for the command line, and a pytest suite for authors of plugins.

In the tests of a package that offers an estimator, these lines are the whole suite (one test a property):

    from grpo_ds.conformance import estimator_suite

    TestMine = estimator_suite("mine", scale=0.5)

`grpo-ds check-estimator mine --option scale=0.5` prints the same properties as a table.
"""

from grpo_ds.conformance.estimators import PROPERTIES, Result, check_estimator, estimator_suite
from grpo_ds.conformance.subject import Subject

__all__ = ["PROPERTIES", "Result", "Subject", "check_estimator", "estimator_suite"]
