"""The server's edge: connections, bodies, access, the log, and the end of the process."""
