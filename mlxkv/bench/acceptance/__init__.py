"""`mlxkv verify --full`: what a model can do, tried out one after another."""
