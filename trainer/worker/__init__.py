"""One rank of one attempt: builds, trains, writes down and commits."""
