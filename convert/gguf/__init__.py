"""A GGUF file as a source: its header, config, weights and tokenizer."""
