"""Files of a model directory, read and checked: config, weights, quantization, mlxkv.json."""
