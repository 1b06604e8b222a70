#!/bin/bash
# mlx 0.32.4, CPU backend: `mx.mean` of float16; `mx.cumsum` and `mx.sum` of int8.
#
# Expected: a mean is of the numbers' own size, so it is in range where they are: numpy and torch add
# float16 up in float32. And the sum of small integers widens in a running sum as it does in `sum`.
# Seen: the sum is kept in float16, and the mean of four times 60,000 is inf: so is a mean of squares
# long before the numbers are large. `sum` of int8 gives int32, `cumsum` int8, which wraps.
#
#   mean of 60000 x 4: inf (numpy 60000.0)
#   sum of int8 100, 100: 200
#   cumsum of int8 100, 100: [100, -56] (numpy [100, 200])
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
on_linux=; [ "$(uname)" = Linux ] && on_linux=mlx-cpu==0.32.4
# shellcheck disable=SC2086  # one package or none
venv/bin/pip install --quiet --disable-pip-version-check mlx==0.32.4 numpy==2.4.6 $on_linux
cat > finding.py <<'P'
import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
large = np.full(4, 60000, np.float16)
small = np.array([100, 100], np.int8)
mean = mx.mean(mx.array(large)).item()
total, running = mx.sum(mx.array(small)).item(), mx.cumsum(mx.array(small)).tolist()
print(f"mean of 60000 x 4: {mean} (numpy {np.mean(large)})")
print(f"sum of int8 100, 100: {total}")
print(f"cumsum of int8 100, 100: {running} (numpy {np.cumsum(small).tolist()})")
assert (mean, total, running) == (np.inf, 200, [100, -56]), "it has changed"
P
venv/bin/python finding.py
