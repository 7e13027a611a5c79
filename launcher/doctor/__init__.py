"""`muster doctor`: looks at the machines, the storage and the recipe before a run does."""
