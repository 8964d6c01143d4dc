"""What is read in gin files, and what they would run."""
