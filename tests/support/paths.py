"""Where the tests' files lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "families" / "golden"
TOKENIZERS = ROOT / "tests" / "support" / "tokenizers"

XML_TEMPLATE = Path(__file__).parent / "call_templates" / "xml.jinja"
