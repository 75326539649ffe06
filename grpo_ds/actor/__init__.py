"""The DeepSpeed side: the policy that is trained, the frozen reference, their configuration and checkpoints."""
