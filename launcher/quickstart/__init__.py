"""The first run: a small model, a small corpus, one fine-tuning, and what it changed."""
