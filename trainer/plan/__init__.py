"""The plan of a run: each rank's memory, computed from the base's configuration before anything is started."""
