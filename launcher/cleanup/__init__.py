"""`muster rm` and `muster gc`: deletes runs, and what no run uses any more."""
