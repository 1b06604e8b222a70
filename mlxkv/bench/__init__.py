"""What is measured and checked on a machine: `mlxkv bench`, `verify` and `doctor`."""
