"""grpo_ds trains language models by GRPO, DAPO and their relatives on DeepSpeed.

Importing this package, or `grpo_ds.config`, imports no torch: the command line answers at once.
"""

__version__ = "0.1.0"
