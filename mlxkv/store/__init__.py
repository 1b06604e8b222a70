"""Where models come from and lie: names, catalog, Hugging Face, settings."""
