"""Errors that a person can act on, and the end of a sentence about an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Something in the configuration that its author has to change; the message is one sentence."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence with the remedy."""


class TrainingPaused(TrainingError):
    """What a step needs is not to be had now; it has not touched the state, which the loop saves before it leaves."""


def closest(name: str, names: Iterable[str]) -> str:
    """ " (nearest: 'x')" for the middle of a sentence, or nothing when no name is close."""
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (nearest: {match[0]!r})" if match else ""


def nearest(name: str, known: Iterable[str], otherwise: str = "it has") -> str:
    """The end of a sentence about an unknown name: '; did you mean 'x'?', or the list of what there is behind `otherwise`."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean '{match[0]}'?" if match else f"; {otherwise} {', '.join(known) or 'nothing'}."
