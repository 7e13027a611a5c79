"""Runs that start elsewhere: a recipe as a job of Ray, Slurm or Kubernetes."""
