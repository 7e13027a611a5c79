"""`muster plan`: what a recipe needs, and the tables that show it."""
