"""One attempt on Ray Train, and what Ray knows of the nodes. Only this package and `launcher.doctor` import ray."""
