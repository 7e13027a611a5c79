"""What several tests share: a small model folder, an S3 server, free ports, bounded waits."""
