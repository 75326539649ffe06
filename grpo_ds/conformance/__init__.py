"""Is an estimator sound? A table of properties for the command line, and a pytest suite for authors of plugins.

`grpo-ds check-estimator mine --option scale=0.5` prints the table. A whole package that offers an estimator, with its
tests (one a property), is four files; then `pip install .` and `algorithm: {adv_estimator: midrange}` in a recipe:

    pyproject.toml
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"

    setup.cfg
        [metadata]
        name = midrange
        version = 1.0
        [options]
        py_modules = midrange
        [options.entry_points]
        grpo_ds.estimators =
            midrange = midrange:Midrange

    midrange.py
        from dataclasses import dataclass
        from grpo_ds.estimators.base import check_batch

        @dataclass(frozen=True, kw_only=True)
        class Midrange:
            "A_i = scale * (R_i - the middle between the smallest and the largest reward of its group)."

            scale: float = 1.0
            "Factor on every advantage."

            def __call__(self, token_rewards, response_mask, group_index, greedy_rewards=None):
                batch = check_batch(token_rewards, response_mask, group_index)
                totals, groups = batch.totals, batch.groups
                middle = (groups.min(totals) + groups.max(totals)) / 2
                return batch.spread(self.scale * (totals - middle[groups.index])), batch.spread(totals)

    test_midrange.py
        from grpo_ds.conformance import estimator_suite

        TestMidrange = estimator_suite("midrange", scale=0.5)

What an estimator is given and may ask for is in `grpo_ds.estimators.base`. The other groups are entered in the same way:
`grpo_ds.losses`, `grpo_ds.rewards`, `grpo_ds.filters`.
"""

from grpo_ds.conformance.estimators import PROPERTIES, Result, check_estimator, estimator_suite
from grpo_ds.conformance.subject import Subject

__all__ = ["PROPERTIES", "Result", "Subject", "check_estimator", "estimator_suite"]
