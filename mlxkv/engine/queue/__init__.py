"""Requests that wait: whose is next, and what is prepared of them meanwhile."""
