"""The Python face: load, LLM, conversations, plan."""
