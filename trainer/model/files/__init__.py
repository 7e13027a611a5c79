"""A model as files: fetched, checked, identified, and read by ranges."""
