"""Other programs, started so that they speak to this machine's models."""
