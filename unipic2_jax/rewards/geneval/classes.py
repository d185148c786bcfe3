"""The 80 classes of COCO in GenEval's words."""

from __future__ import annotations

from unipic2_jax.core.assets import ASSETS

GENEVAL = ASSETS / "geneval"
# In COCO's order.
CLASSES = tuple((GENEVAL / "object_names.txt").read_text(encoding="utf-8").split("\n")[:-1])

# What detectors call them otherwise: COCO's own names, and those of PASCAL VOC, which some label files keep.
_OTHER_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def class_name(label: str) -> str:
    """GenEval's name for a detector's label; other labels stay as they are."""
    return _OTHER_NAMES.get(label, label)
