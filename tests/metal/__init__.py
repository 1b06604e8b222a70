"""What stands in for a Mac: Metal's graphs, built on a machine without one and counted."""
