"""Files that ship with the project."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"

# The pretrained tiny models: with text encoders, with a vision-language model, and the EditReward that stands on that one.
TINY, TINY_METAQUERY, TINY_EDIT_REWARD = (str(ASSETS / name) for name in ("tiny", "tiny_metaquery", "tiny_edit_reward"))
