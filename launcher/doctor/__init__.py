"""`muster doctor`: checks the machines, the storage and the recipe before a run uses them."""
