"""Grammars of tool calls in the formats of the families, and keys that come once."""
