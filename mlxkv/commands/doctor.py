"""`mlxkv doctor`: what MLX runs on, and how to install what is missing."""

from __future__ import annotations

import json

from mlxkv.commands.options import AsJson


def doctor(as_json: AsJson = False) -> int:
    """Check what MLX runs on, and say how to fix problems."""
    from mlxkv.bench import doctor as checks

    findings = checks.examine()
    print(json.dumps(checks.to_dict(findings), indent=2) if as_json else checks.text(findings))
    return 1 if any(finding.state == "broken" for finding in findings) else 0
