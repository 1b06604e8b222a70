"""A file for each command: options, then one call."""
