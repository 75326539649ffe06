"""Samples -> micro-batches: who trains on what (`plan`) and as which tensors (`collate`). Pure; knows no process group."""

from grpo_ds.batching.collate import MicroBatch, collate
from grpo_ds.batching.plan import Layout, SampleSize, UpdatePlan, plan_updates

__all__ = ["Layout", "MicroBatch", "SampleSize", "UpdatePlan", "collate", "plan_updates"]
