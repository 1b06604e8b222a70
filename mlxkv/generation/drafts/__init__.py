"""Drafts of the next tokens: who proposes them, and how many are worth a pass."""
