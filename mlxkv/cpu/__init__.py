"""C++ kernels for MLX's CPU backend, built at first use; `nn.kernels` is the one that uses them."""
