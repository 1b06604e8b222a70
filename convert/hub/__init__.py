"""A folder in Hugging Face's style as a source: safetensors and tokenizer files."""
