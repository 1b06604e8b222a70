"""How keys and values are described and stored: types, storage formats, layout, buffers."""
