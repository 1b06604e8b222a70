"""Formats in which models write reasoning and tool calls. `mlxkv.parsers.formats` picks one."""
