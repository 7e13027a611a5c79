"""`muster plan`: the table that shows the memory, time and cost of a recipe."""
