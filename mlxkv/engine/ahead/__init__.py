"""What is computed of next prompts while there are no requests."""
