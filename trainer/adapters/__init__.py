"""Fine-tuning methods, and the interface between them and the rest of the trainer."""

from trainer.adapters.base import Adapter, make_adapter
from trainer.adapters.verify import verify_saved

__all__ = ["Adapter", "make_adapter", "verify_saved"]
