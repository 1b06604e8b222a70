"""One family of GGUF architectures a file: what their metadata and names mean."""
