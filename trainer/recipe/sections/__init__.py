"""The sections of a recipe, each with the part of muster that it configures."""
