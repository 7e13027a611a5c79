"""Imported by the process that ranks are forked from: peft and bitsandbytes, as quickly as training imports them."""

from trainer.fast_imports import load_libraries

load_libraries()
