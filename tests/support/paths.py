"""Where the tests' files lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "families" / "golden"
TOKENIZERS = ROOT / "tests" / "support" / "tokenizers"

XML_TEMPLATE = Path(__file__).parent / "call_templates" / "xml.jinja"
_BESIDE = (folder / "shared" / "real" / "chat_templates" for folder in ROOT.parents)
REAL_TEMPLATES = next((folder for folder in _BESIDE if folder.is_dir()), ROOT / "no templates")
"""Chat templates as they were published, where they lie beside the project; never a part of it."""
