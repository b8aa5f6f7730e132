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
_KEY = r"(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|secret(?:[_-]?access)?(?:[_-]?key)?|passw(?:or)?d|token|auth|signature|sig)"
# Each names what to keep before the secret.
_PATTERNS = [
    re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+(?=@)", re.IGNORECASE),
    re.compile(rf"(?P<before>[?&;](?:[\w-]*[_-])?{_KEY}=)[^\s&;'\"]+", re.IGNORECASE),
    re.compile(
        rf"(?P<before>\b(?:[\w-]*[_-])?{_KEY}[\"']?\s*[=:]\s*[\"']?(?:bearer )?)[\w+/.=-]{{16,}}", re.IGNORECASE
    ),
    re.compile(r"(?P<before>\bbearer )[\w+/.=~-]{16,}", re.IGNORECASE),
    re.compile(r"(?P<before>)\bhf_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"(?P<before>)\bwandb_v\d_[A-Za-z0-9_-]{16,}"),
    re.compile(r"(?P<before>)\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),  # AWS
    re.compile(r"(?P<before>)\bAIza[\w-]{35}"),  # Google
    re.compile(r"(?P<before>)\bgh[pousr]_[A-Za-z0-9]{30,}"),  # GitHub
]
_VARIABLE = re.compile(r"(?:TOKEN|API_KEY|SECRET|SECRET_KEY|ACCESS_KEY|ACCESS_KEY_ID|PASSWORD)$")
_SHORTEST_VARIABLE = 12  # shorter values could be ordinary words


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with stars for what looks like a secret, and for the values of environment variables that are named as one."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _SHORTEST_VARIABLE and _VARIABLE.search(name.upper()):
            text = text.replace(value, STARS)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<before>{STARS}", text)
    return text


def find_secret(value: object) -> bool:
    """Whether a setting, or something in it, looks like a secret."""
    if isinstance(value, str):
        return redact(value, {}) != value
    if isinstance(value, dict):
        return any(map(find_secret, value.values()))
    return isinstance(value, list | tuple) and any(map(find_secret, value))
