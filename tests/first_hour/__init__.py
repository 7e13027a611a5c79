"""A new user's first hour with muster, typed into a terminal of 80 columns: ``python -m tests.first_hour``."""
