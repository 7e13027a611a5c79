"""Several runs in the same processes, on one frozen base model: each micro-batch of the model has rows of all runs."""
