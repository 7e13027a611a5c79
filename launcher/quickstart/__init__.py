"""The quickstart: a small model, a small corpus, one fine-tuning run, and a view of what it changed."""
