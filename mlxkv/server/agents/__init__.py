"""What coding agents write into prompts, and what is done so that no prefix is lost by it."""
