"""Submits a recipe as a job of Ray, Slurm or Kubernetes, and cancels it."""
