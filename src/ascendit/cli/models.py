"""From the name of a model to its folder, without importing torch: a bad call ends at once."""

from __future__ import annotations

from pathlib import Path

from ascendit.errors import UsageError


def model_folder(name: str) -> Path:
    """The folder of `demo`, a path, hf:org/name or ms:org/name. Raises UsageError E-USE-02 if absent."""
    if name == "demo":
        import ascendit

        return Path(ascendit.__file__).parent / "demo"
    if name.startswith(("hf:", "ms:")):
        from ascendit.checkpoint.hub import fetch

        return fetch(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise UsageError(
            f"no model at {name}",
            needs="a folder, hf:org/name, ms:org/name, or --demo",
            fix="correct the path, or put hf: before a name on Hugging Face",
            code="E-USE-02",
        )
    return path
