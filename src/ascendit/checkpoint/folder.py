"""From the name of a model to its folder, without importing torch: a bad call ends at once."""

from __future__ import annotations

from pathlib import Path

from ascendit.errors import EnvironmentProblem, UsageError

DEMO = Path(__file__).resolve().parents[1] / "demo"
"""The model that comes with the package."""


def model_folder(model: str | Path, *, experts: bool = True) -> Path:
    """The folder of "demo", a path, hf:org/name or ms:org/name (with "@revision").

    `experts`: False when the weights of its transformers are not wanted, which need not be downloaded then.
    Raises UsageError E-USE-02 when there is none.
    """
    name = str(model)
    if name == "demo":
        if not DEMO.is_dir():
            raise EnvironmentProblem(
                f"the demo model is not in this installation ({DEMO})",
                needs="the weights that come with the package",
                fix="install ascendit again, or: python tools/train_demo.py --export src/ascendit/demo",
                code="E-ENV-01",
            )
        return DEMO
    if name.startswith(("hf:", "ms:")):
        from ascendit.checkpoint.hub import fetch

        return fetch(name, experts=experts)
    path = Path(name).expanduser()
    if not path.exists():
        raise UsageError(
            f"no model at {name}",
            needs="a folder, hf:org/name, ms:org/name, or demo",
            fix="correct the path, or put hf: before a name on Hugging Face",
            code="E-USE-02",
        )
    return path
