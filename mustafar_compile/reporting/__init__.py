"""What is said of a compilation: reports, notices, the log."""
