"""What a job would take in bytes and seconds, before anything is loaded."""
