"""Answers that are put away, and go on where they were."""
