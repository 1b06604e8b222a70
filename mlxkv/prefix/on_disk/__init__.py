"""Pages as files: format, folder, writer, and reading ahead."""
