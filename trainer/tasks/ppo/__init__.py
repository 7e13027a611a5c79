"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) of a language model, as Ziegler et al. 2019
(arXiv:1909.08593) and Stiennon et al. 2020 (arXiv:2009.01325) have it.

A step of the run is an iteration. Every rank writes texts to its micro-batches of prompts and has them rated; the
rollouts of all ranks are then gathered on each, since they are small, and everything between a text and its loss
(`advantages`) is computed from all of them, the same on every rank. So no sum depends on how prompts were shared out.
"""
