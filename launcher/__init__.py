"""The command line, the driver on Ray, and what people see of a run."""
