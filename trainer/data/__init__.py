"""Data whose order belongs to the run: freeze the inputs, prepare once, plan, and stream by an integer cursor."""

from trainer.data.types import Batch, Cursor, MicroBatch, RankStep, SampleRef, StepPlan

__all__ = ["Batch", "Cursor", "MicroBatch", "RankStep", "SampleRef", "StepPlan"]
