"""Quantizing well: what decides quality is measured on text, and values are rounded by it."""
