"""The recipe's section `reward`: the functions and what is made of their values. No torch here; see `config`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_ds.errors import require, require_from_zero, require_positive


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    functions: list[str]
    """Reward functions: an entry point's name, `package.module.function` or `path/file.py:function`."""
    weights: list[float] | None = None
    """Weight of each function in the score; null: 1 each."""
    function_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of functions that are classes, by the function's name: {Length: {target: 100}}."""
    workers: int = 2
    """Processes that run reward functions, per node."""
    timeout_s: float = 10.0
    """Deadline a sample, in seconds: a call that misses it is killed, and its samples are tried one by one."""
    on_error: Literal["fail", "unscored"] = "fail"
    """A function that raises or misses its deadline: end the run, or count the sample as `cannot be scored` (it is left
    out, whatever the other functions say)."""
    dry_run_rows: int = 2
    """Rows on which each function is tried before any model is loaded; 0: none."""
    overlong_buffer_len: int = 0
    """DAPO's soft overlong buffer B, in tokens: the last B of max_response_tokens are punished; 0: off."""
    overlong_penalty_factor: float = 1.0
    """Penalty at the full length (DAPO's factor f), in units of reward."""

    def __post_init__(self) -> None:
        require(len(self.functions) > 0, "reward.functions is empty: name at least one reward function")
        for name in self.functions:
            require(
                self.functions.count(name) == 1,
                f"reward.functions names {name!r} twice: name it once, and weight it with reward.weights",
            )
        require(
            "score" not in self.functions,
            "reward.functions names 'score', which stands for the weighted sum of all functions in other settings: name "
            "the function by its place, as package.module.score or path/file.py:score",
        )
        require(
            self.weights is None or len(self.weights) == len(self.functions),
            f"reward.weights has {len(self.weights or [])} entries for {len(self.functions)} reward.functions: "
            "give one weight a function",
        )
        require(
            self.weights is None or (all(map(math.isfinite, self.weights)) and any(self.weights)),
            f"reward.weights is {self.weights}: give finite weights, and one of them other than 0",
        )
        require_positive("reward", self, "timeout_s", "workers")
        require_from_zero("reward", self, "dry_run_rows", zero="no dry run")
        require_from_zero("reward", self, "overlong_buffer_len", "overlong_penalty_factor", zero="no penalty")
