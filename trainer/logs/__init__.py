"""Logs of the ranks' output, in the run's storage: `rank` redirects the output, `keeper` stores it, `parts` bounds and
reads it. Nothing is imported here, because a keeper starts with every rank and has to start fast."""
