"""Texts for reinforcement learning from an inference engine: a client for servers with vLLM's OpenAI interface, and the
start and watch of servers of our own."""
