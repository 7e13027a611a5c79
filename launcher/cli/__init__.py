"""The command line: one file per command, which reads its options, calls what does the work, and prints."""
