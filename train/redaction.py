"""Secrets (W&B and Hub tokens, keys in URLs) as stars in whatever is printed or stored.

A configuration must not hold any (`find_secret` is asked by `train/config_rules.py`), so that what is made of it - the run
folder, W&B's page, reports - holds none either. What others say, such as a library's error with its URL, goes through
`redact` on its way out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

STARS = "***"
_NAMED = r"(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|secret(?:[_-]?(?:access[_-]?)?key)?|password|passwd|token|auth|signature|sig|credential)"
# Each with the part to keep before the secret, and after it.
_PATTERNS = [
    re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://)(?P<secret>[^\s/@'\"]+)(?P<after>@)", re.IGNORECASE),
    re.compile(rf"(?P<before>[?&;](?:[\w-]*[_-])?{_NAMED}=)(?P<secret>[^\s&;'\"]+)(?P<after>)", re.IGNORECASE),
    re.compile(rf"(?P<before>\b(?:[\w-]*[_-])?{_NAMED}[\"']?\s*[=:]\s*[\"']?(?:bearer )?)(?P<secret>[\w+/.=-]{{16,}})(?P<after>)", re.IGNORECASE),
    re.compile(r"(?P<before>\bbearer )(?P<secret>[\w+/.=~-]{16,})(?P<after>)", re.IGNORECASE),
    re.compile(r"(?P<before>)(?P<secret>\bhf_[A-Za-z0-9]{16,})(?P<after>)"),  # Hugging Face
    re.compile(r"(?P<before>)(?P<secret>\bwandb_v\d_[A-Za-z0-9_-]{16,})(?P<after>)"),
    re.compile(r"(?P<before>)(?P<secret>\b(?:AKIA|ASIA)[A-Z0-9]{16}\b)(?P<after>)"),  # AWS
    re.compile(r"(?P<before>)(?P<secret>\bAIza[\w-]{35})(?P<after>)"),  # Google
    re.compile(r"(?P<before>)(?P<secret>\bgh[pousr]_[A-Za-z0-9]{30,})(?P<after>)"),  # GitHub
]  # fmt: skip
_VARIABLE = re.compile(r"(?:TOKEN|API_KEY|SECRET|SECRET_KEY|ACCESS_KEY|ACCESS_KEY_ID|PASSWORD)$")
_SHORTEST_VARIABLE = 12  # shorter values could be ordinary words


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with stars for what looks like a secret, and for the values of environment variables that are named as one."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _SHORTEST_VARIABLE and _VARIABLE.search(name.upper()):
            text = text.replace(value, STARS)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<before>{STARS}\g<after>", text)
    return text


def find_secret(value: object) -> bool:
    """Whether a setting, or something in it, looks like a secret."""
    if isinstance(value, str):
        return redact(value, {}) != value
    if isinstance(value, dict):
        return any(map(find_secret, value.values()))
    return isinstance(value, list | tuple) and any(map(find_secret, value))
