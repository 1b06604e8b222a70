"""What answers have in all of OpenAI's APIs: usage, log-probabilities, why they ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxkv.generation.outputs import TokenLogprobs
from mlxkv.server.results import Progress, details, finite


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The shape of chat completions and responses."""

    def shown(token: TokenLogprobs) -> dict[str, Any]:
        return {
            "token": token.text,
            "logprob": finite(token.logprob),
            "bytes": list(token.bytes),
        }

    content = [{**shown(each), "top_logprobs": [shown(top) for top in each.top]} for each in tokens]
    return {"content": content, "refusal": None}


def usage(answers: Sequence[Progress], n_each: int = 1) -> dict[str, Any]:
    """Tokens of a request.

    Args:
        answers: of all prompts.
        n_each: answers to one prompt, whose tokens count once.
    """
    prompts = [each.stats for each in answers[::n_each] if each.stats is not None]
    n_prompt = sum(stats.prompt_tokens for stats in prompts)
    n_answer = sum(each.stats.generated_tokens for each in answers if each.stats is not None)
    first = details(prompts[0] if prompts else None)
    if len(prompts) > 1:
        summed = {name: 0 for name in first if name != "miss"}
        for stats in prompts:
            summed = {name: n + details(stats)[name] for name, n in summed.items()}
        first = {**summed, "miss": next((d for p in prompts if (d := details(p)["miss"])), None)}
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": first,
        "completion_tokens_details": {
            "reasoning_tokens": sum(each.n_reasoning for each in answers)
        },
    }
