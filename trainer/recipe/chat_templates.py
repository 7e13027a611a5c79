"""The chat templates that a recipe may name: files of ``trainer/chat_templates``, written for muster."""

from __future__ import annotations

CHAT_TEMPLATES = ("chatml", "llama3", "qwen3", "gemma", "mistral", "phi", "deepseek", "glm", "alpaca", "vicuna")
