"""Prompts of GPT-OSS, written without its template."""
