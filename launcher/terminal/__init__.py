"""The console, texts that are safe to print, and commands to copy."""
