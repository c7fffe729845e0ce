"""Check a part of a model without reading its weights: config values, and headers against the config."""

from __future__ import annotations

from ascendit.checkpoint.component import Part
from ascendit.checkpoint.reader import Shards


def check_part(part: Part) -> Shards | None:
    """The headers of `part`, checked against its config; None if it has no weights.

    Raises CheckpointError as `Shards.from_part` does.
    """
    return Shards.from_part(part) if part.has_weights else None
