"""Conversations to prompt text: chat templates, what they take, and GPT-OSS's harmony."""
