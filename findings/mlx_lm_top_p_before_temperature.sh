#!/bin/bash
# mlx-lm 0.32.2 on mlx 0.32.4, `make_sampler(temp=, top_p=, min_p=)`, of `generate` and its server.
#
# Expected: the tokens that top-p and min-p keep are chosen from the probabilities at the temperature
# that is drawn at, as transformers and vLLM do: a higher temperature keeps more of them.
# Seen: they are chosen at temperature 1, whatever it is. Of tokens with 60, 30, 7 and 3% the same
# two are kept at every temperature, where top_p=0.8 at 2 keeps three, and at 0.3 one.
#
#   top_p=0.8, kept at temperature 0.3, 1, 2: [2, 2, 2] expected [1, 2, 3]
#   min_p=0.4, kept at temperature 0.3, 1, 2: [2, 2, 2] expected [1, 2, 2]
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
on_linux=; [ "$(uname)" = Linux ] && on_linux=mlx-cpu==0.32.4
# shellcheck disable=SC2086  # one package or none
venv/bin/pip install --quiet --disable-pip-version-check mlx-lm==0.32.2 mlx==0.32.4 $on_linux
cat > finding.py <<'P'
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

mx.set_default_device(mx.cpu)
chances = mx.array([[0.6, 0.3, 0.07, 0.03]])


def kept(temperature, **bound):
    """How many different tokens 2,000 draws give."""
    mx.random.seed(0)
    draw = make_sampler(temp=temperature, **bound)
    return len(set(draw(mx.repeat(mx.log(chances), 2000, axis=0)).tolist()))


def expected(temperature, top_p=0.0, min_p=0.0):
    warm = sorted(mx.softmax(mx.log(chances) / temperature, axis=-1)[0].tolist(), reverse=True)
    if min_p:
        return sum(chance >= min_p * warm[0] for chance in warm)
    return 1 + sum(sum(warm[: i + 1]) < top_p for i in range(len(warm) - 1))


for bound in ({"top_p": 0.8}, {"min_p": 0.4}):
    (name, value), = bound.items()
    found = [kept(t, **bound) for t in (0.3, 1.0, 2.0)]
    right = [expected(t, **bound) for t in (0.3, 1.0, 2.0)]
    print(f"{name}={value}, kept at temperature 0.3, 1, 2: {found} expected {right}")
    assert found == [2, 2, 2] != right, "the behaviour has changed"
P
venv/bin/python finding.py
