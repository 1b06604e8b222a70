"""The Python API: load, LLM, conversations, plan."""
