"""Reinforcement learning from texts that the model in training writes: what the tasks ``ppo`` and ``grpo`` share.

A step of the run has three parts. Every rank lets an engine write texts for its micro-batches of prompts, and computes
their rewards. The rollouts of all ranks, which are small, are gathered on each rank, which computes the advantages of
all of them. Then the policy is updated, with the texts distributed over the ranks anew. So no number depends on how
prompts were distributed over the ranks.
"""
