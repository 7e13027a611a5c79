"""What each rank prints, kept in the run's storage: `rank` redirects it, `keeper` stores it, `parts` bounds and reads
it. Nothing is imported here, since a keeper starts with every rank."""
