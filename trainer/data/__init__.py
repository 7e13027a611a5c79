"""Training data: freeze the inputs, prepare them once, plan their order, and stream steps from an integer cursor.

The order of samples is a property of the run; it does not depend on the number of workers.
"""

from trainer.data.loading.disk_cache import DiskCache, open_caches
from trainer.data.loading.evaluation import eval_batches
from trainer.data.loading.stream import Stream, count_steps
from trainer.data.order.pack_order import epoch_order
from trainer.data.prepare.executor import process_pool
from trainer.data.prepare.freeze import check_local_sources, describe, freeze
from trainer.data.prepare.partial import PartialDataset, open_begun
from trainer.data.prepare.prepare import (
    MapWindows,
    PreparationProgress,
    check_first_rows,
    prepare_dataset,
    resolve_chat_template,
)
from trainer.data.prepare.prepared import PreparedDataset, open_prepared
from trainer.data.prepare.split import WINDOW_BYTES
from trainer.data.spec import FrozenObject, FrozenSource, PreparationSpec, tokenizer_fingerprint
from trainer.data.summary import Summary, summarise
from trainer.data.types import Batch, Cursor, MicroBatch, RankStep, SampleRef, StepPlan

__all__ = [
    "WINDOW_BYTES",
    "Batch",
    "Cursor",
    "DiskCache",
    "FrozenObject",
    "FrozenSource",
    "MapWindows",
    "MicroBatch",
    "PartialDataset",
    "PreparationProgress",
    "PreparationSpec",
    "PreparedDataset",
    "RankStep",
    "SampleRef",
    "StepPlan",
    "Stream",
    "Summary",
    "check_first_rows",
    "check_local_sources",
    "count_steps",
    "describe",
    "epoch_order",
    "eval_batches",
    "freeze",
    "open_begun",
    "open_caches",
    "open_prepared",
    "prepare_dataset",
    "process_pool",
    "resolve_chat_template",
    "summarise",
    "tokenizer_fingerprint",
]
