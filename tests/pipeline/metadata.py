"""Read the metadata that `Video.save` stores in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
from PIL import Image


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Metadata of an mp4, webm, gif, png or folder of frames; {} if absent."""
    file = Path(path) / "frame_0000.png" if Path(path).is_dir() else Path(path)
    if file.suffix.lower() == ".png":
        with Image.open(file) as image:
            tags = {str(key): str(value) for key, value in image.info.items()}
    else:
        with av.open(str(file)) as container:
            tags = dict(container.metadata)
    [comment] = [value for key, value in tags.items() if key.lower() == "comment"] or ["{}"]
    metadata = json.loads(comment)
    assert isinstance(metadata, dict)
    return metadata
