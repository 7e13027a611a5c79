"""Environments, which answer the turns of a text: the interface, the processes that they run in, and a calculator."""
