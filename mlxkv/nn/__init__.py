"""Blocks that families are built of: model, attention, rope, linear, experts, batches."""
