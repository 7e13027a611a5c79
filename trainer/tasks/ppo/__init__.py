"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) of a language model, as in Ziegler et al. 2019
(arXiv:1909.08593) and Stiennon et al. 2020 (arXiv:2009.01325).

A step of the run is an iteration. Every rank generates texts for its micro-batches of prompts and computes their
rewards. The rollouts of all ranks, which are small, are then gathered on each rank, and the advantages are computed
from all of them, the same on every rank. So no sum depends on how prompts were distributed over the ranks.
"""
