"""KV under a name: manifests, archives, the registry, garbage collection."""
