"""Pictures and sound in the messages of a request."""
