"""Keys come from the environment: command lines and configurations are logged."""

from __future__ import annotations

import os


def read_key(variable: str, what: str) -> str | None:
    """The key that the environment variable holds; None when none is named.

    Args:
      what: whose key it is, for messages.

    Raises:
      ValueError: when the variable holds no key; the message never shows what it holds.
    """
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    state = "holds something that is no key" if key else "is not set"
    raise ValueError(
        f"The {what}'s key is read from the environment variable {variable}, which {state}; set it, name another as "
        "api_key_env, or leave api_key_env empty ('') when no key is needed."
    )
