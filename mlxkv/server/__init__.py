"""HTTP front ends of the engine: each a thin translation of one API."""
