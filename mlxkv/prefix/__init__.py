"""KV of shared prefixes in RAM and on SSD, as pages of 256 tokens."""
