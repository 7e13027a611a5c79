"""What is trained on top of the base: the methods, and the one seam between them and the rest."""

from trainer.adapters.base import Adapter, make_adapter
from trainer.adapters.verify import verify_saved

__all__ = ["Adapter", "make_adapter", "verify_saved"]
