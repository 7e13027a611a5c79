"""Tasks that learn from judged answers without a reward model: their losses compare the likelihoods of answers."""
