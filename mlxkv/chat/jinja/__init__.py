"""Templates in a sandbox: what they may do, and how much."""
