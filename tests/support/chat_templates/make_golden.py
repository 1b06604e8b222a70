"""Make golden.json: what transformers renders for every template and conversation of cases.py.

    pip install -e '.[oracle]'
    python -m tests.support.chat_templates.make_golden

An entry is {"text": ...}, or {"error": ...} where the template raises.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.support.chat_templates.cases import CONVERSATIONS, GOLDEN, TEMPLATES, TOKENS


def render(source: str, case: dict[str, Any]) -> dict[str, str]:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **TOKENS)
    options = {"add_generation_prompt": True, **case}
    messages = options.pop("messages")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    assert isinstance(text, str)
    return {"text": text}


def main() -> None:
    golden = {
        name: {case: render(path.read_text(), dict(spec)) for case, spec in CONVERSATIONS.items()}
        for name, path in TEMPLATES.items()
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
