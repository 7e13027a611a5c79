"""`muster sweep`: many runs that differ in a few settings, on one Ray, and what they have shown."""
