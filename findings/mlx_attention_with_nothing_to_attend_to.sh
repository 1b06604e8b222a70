#!/bin/bash
# mlx 0.32.4, CPU backend: `mx.fast.scaled_dot_product_attention` with a mask of booleans.
#
# Expected: a query that may see no key at all (a row of padding) gives NaN, as a softmax of nothing
# but -inf does, or zeros, as torch does: either shows that nothing was seen.
# Seen: it gives the plain mean of ALL values, those that its mask forbids among them, and a key that
# no query may see reaches the output. With the same mask as numbers (0 and -inf) it is NaN.
#
#   booleans: [2.0, 2.0]
#   numbers: [nan, nan]
#   the forbidden values' mean: [2.0, 2.0]
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
on_linux=; [ "$(uname)" = Linux ] && on_linux=mlx-cpu==0.32.4
# shellcheck disable=SC2086  # one package or none
venv/bin/pip install --quiet --disable-pip-version-check mlx==0.32.4 $on_linux
cat > finding.py <<'P'
import math

import mlx.core as mx

mx.set_default_device(mx.cpu)
ones = mx.ones((1, 1, 3, 2))
values = mx.array([[[[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]]])
nothing = mx.zeros((1, 1, 1, 3), mx.bool_)


def attention(mask):
    out = mx.fast.scaled_dot_product_attention(ones[:, :, :1], ones, values, scale=1.0, mask=mask)
    return out.flatten().tolist()


by_booleans = attention(nothing)
by_numbers = attention(mx.where(nothing, 0.0, -math.inf))
mean = values.mean(axis=2).flatten().tolist()
print("booleans:", by_booleans)
print("numbers:", by_numbers)
print("the forbidden values' mean:", mean)
assert by_booleans == mean, "the behaviour has changed"
assert all(map(math.isnan, by_numbers)), "the behaviour has changed"
P
venv/bin/python finding.py
