"""Judge a model before its weights are read: one function for `inspect`, `--dry-run`, `load` and `generate`.

`checkpoint/layout_check.py` lists the problems; this adds the model's defaults. Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.layout_check import CheckedLayout, check_layout
from ascendit.checkpoint.part_configs import TransformerConfig
from ascendit.errors import AscenditError
from ascendit.pipeline.defaults import Defaults, Source, defaults_for


@dataclass(frozen=True)
class CheckedModel:
    """A model with all its problems."""

    checked: CheckedLayout
    defaults: Defaults | None
    """None for a checkpoint that is not a pipeline, and if a config is damaged."""
    problems: tuple[AscenditError, ...]


def check_model(layout: Layout, source: Source = "model") -> CheckedModel:
    """Check a recognised model: every part, whether the parts fit each other, and defaults.

    `source`: see `defaults_for`.
    """
    checked = check_layout(layout)
    defaults, problems = None, list(checked.problems)
    valid = not any(problem.code in ("E-CKP-05", "E-CKP-06") for problem in problems)
    if layout.kind == "diffusers" and "vae" in layout.parts and valid:
        try:
            for expert in layout.experts:  # an expert with damaged tensors may have a valid config
                TransformerConfig.read(expert.folder / "config.json", expert.config)
            defaults = defaults_for(layout, source)
        except AscenditError as e:
            problems.append(e)
    return CheckedModel(checked, defaults, tuple(problems))


def require_model(layout: Layout, source: Source = "model") -> tuple[CheckedLayout, Defaults]:
    """(checked parts, defaults) of a pipeline.

    Raises CheckpointError (E-CKP-01) for a layout without the other components, and the first problem of
    `check_model`.
    """
    layout.require_pipeline()
    model = check_model(layout, source)
    if model.problems:
        raise model.problems[0]
    assert model.defaults is not None
    return model.checked, model.defaults
