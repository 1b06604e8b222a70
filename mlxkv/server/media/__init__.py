"""Pictures and sound of requests: from any API's fields to the bytes that the engine takes."""
