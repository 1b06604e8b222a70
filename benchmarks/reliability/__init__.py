"""What the server withstands, measured outside CI. docs/reliability.md has the figures."""
