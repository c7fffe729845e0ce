"""Names of the tensors of text encoders and VAEs in other tools. Does not import torch."""

from __future__ import annotations

from collections.abc import Collection

from ascendit.names import naming_of


def recognise_part(names: Collection[str]) -> str | None:
    """The component that tensors of these names belong to: `transformer`, or None."""
    return "transformer" if naming_of({name: None for name in names}) else None
