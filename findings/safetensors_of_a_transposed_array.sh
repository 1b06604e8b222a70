#!/bin/bash
# safetensors 0.8.0, `safetensors.numpy.save_file` and `safe_open(...).get_slice`, with numpy 2.4.6.
#
# Expected: an array that is a view, transposed or of every second column, is written as the values
# that it shows, or is refused as safetensors.torch refuses one; what is read back is equal. A slice
# of a file takes bounds as numpy does: from the end, and past it.
# Seen: the file has the right shape and other values: those that follow each other in memory. No
# error, no warning. And of a slice, -1 alone is the last row, but [-2:] raises OverflowError, [0:9]
# of 4 rows SafetensorError, and [2:1] SystemError.
#
#   transposed: [[0, 3], [1, 4], [2, 5]] read back: [[0, 1], [2, 3], [4, 5]]
#   every second column: [[0, 2], [3, 5]] read back: [[0, 1], [2, 3]]
#   [-1]: 5 values
#   [-2:]: OverflowError
#   [0:9]: SafetensorError
#   [2:1]: SystemError
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat > finding.py <<'P'
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

array = np.arange(6, dtype=np.int32).reshape(2, 3)
views = {"transposed": array.T, "every second column": array[:, ::2]}
save_file(views, "views.safetensors")
found = load_file("views.safetensors")
for name, view in views.items():
    print(f"{name}: {view.tolist()} read back: {found[name].tolist()}")

save_file({"rows": np.ones((4, 5), np.float32)}, "rows.safetensors")
seen = {}
with safe_open("rows.safetensors", "np") as file:
    rows = file.get_slice("rows")
    for name, index in (("-1", -1), ("-2:", slice(-2, None)), ("0:9", slice(9)), ("2:1", slice(2, 1))):
        try:
            seen[name] = f"{rows[index].size} values"
        except Exception as error:
            seen[name] = type(error).__name__
        print(f"[{name}]: {seen[name]}")
assert not any(np.array_equal(found[name], view) for name, view in views.items()), "it has changed"
errors = ["5 values", "OverflowError", "SafetensorError", "SystemError"]
assert list(seen.values()) == errors, "the behaviour has changed"
P
venv/bin/python finding.py
