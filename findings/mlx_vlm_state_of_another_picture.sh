#!/bin/bash
# mlx-vlm 0.7.10 on mlx 0.32.4, `stream_generate(..., prompt_cache_state=...)`, which its own chat uses.
#
# Expected: a conversation that begins with the same text and another picture of the same size finds
# nothing of the first one behind the picture, as it does where mlx-vlm hashes pictures (apc_manager).
# Seen: the state compares token ids, and every picture is the same run of placeholder tokens. All
# KV of the first picture counts as the second one's, the second picture is not encoded at all, and
# the answer is, to the last digit, the one about the first.
#
#   tokens taken from the cache: 7
#   the two pictures' answers are apart: True
#   the second picture's answer is the first one's: True
#   it is its own: False
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
on_linux=; [ "$(uname)" = Linux ] && on_linux=mlx-cpu==0.32.4
# shellcheck disable=SC2086  # one package or none
venv/bin/pip install --quiet --disable-pip-version-check mlx-vlm==0.7.10 mlx==0.32.4 $on_linux
cat > finding.py <<'P'
"""Two pictures in turn on a tiny random Gemma 3, through `stream_generate` with one state."""
import mlx.core as mx
from mlx_vlm.generate.common import PromptCacheState
from mlx_vlm.generate.dispatch import stream_generate
from mlx_vlm.models.gemma3 import Model, ModelConfig, TextConfig, VisionConfig

mx.random.seed(0)
IMAGE, N = 99, 4
text = TextConfig(
    model_type="gemma3_text", hidden_size=32, num_hidden_layers=2, intermediate_size=64,
    num_attention_heads=2, head_dim=16, vocab_size=100, num_key_value_heads=1,
    query_pre_attn_scalar=16, sliding_window=64, sliding_window_pattern=2, mm_tokens_per_image=N,
)
vision = VisionConfig(
    model_type="siglip_vision_model", num_hidden_layers=1, hidden_size=32, intermediate_size=64,
    num_attention_heads=2, patch_size=8, image_size=32,
)
model = Model(ModelConfig(
    text_config=text, vision_config=vision, model_type="gemma3", vocab_size=100, hidden_size=32,
    image_token_index=IMAGE, eos_token_id=[1],
))


class Detokenizer:
    last_segment = text = ""
    def reset(self): pass
    def add_token(self, token, **_): pass
    def finalize(self): pass


class Tokenizer:
    detokenizer = Detokenizer()
    all_special_ids, eos_token_ids = [], {1}
    def stopping_criteria(self, token): return False


class Processor:
    tokenizer, detokenizer = Tokenizer(), Detokenizer()


def first(ids, pixels, state=None):
    """Log-probabilities of the first token, and the tokens that came out of the cache."""
    inputs = mx.array([ids])
    options = {} if state is None else {"prompt_cache_state": state}
    answer = stream_generate(
        model, Processor(), "", input_ids=inputs, pixel_values=pixels,
        mask=mx.ones_like(inputs), max_tokens=1, temperature=0.0, **options,
    )
    results = list(answer)
    return results[0].logprobs, results[0].cached_tokens


red, blue = mx.ones((1, 3, 32, 32)), mx.random.normal((1, 3, 32, 32))
question = [2, 10, *[IMAGE] * N, 11]
asked_again = [*question, 12, 13]
state = PromptCacheState()
first(question, red, state)
of_red, _ = first(asked_again, red)
of_blue, _ = first(asked_again, blue)
got, n_cached = first(asked_again, blue, state)
apart = mx.abs(of_red - of_blue).max().item()
print("tokens taken from the cache:", n_cached)
print("the two pictures' answers are apart:", apart > 1e-3)
print("the second picture's answer is the first one's:", mx.abs(got - of_red).max().item() < 1e-4)
print("it is its own:", mx.abs(got - of_blue).max().item() < 1e-4)
P
cat > expected <<'X'
tokens taken from the cache: 7
the two pictures' answers are apart: True
the second picture's answer is the first one's: True
it is its own: False
X
venv/bin/python finding.py 2>/dev/null | tee seen
diff expected seen
