"""ascendit: run Wan video diffusion on Ascend NPUs, CUDA GPUs or a plain CPU, with the same numbers.

    import ascendit
    pipe = ascendit.load("demo")
    pipe.generate("a red circle moves right on a black background", seed=7).save("circle.mp4")

Importing this package does not import torch; names are imported on first use. It sets the variables of OpenMP
that the user has not set (`device/cpu_threads.py`), so import it before torch.
"""

import sys

if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and ("-m", "ascendit") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
):
    # `python -m ascendit`: the working directory comes first; it may be a checkpoint with a torch.py
    del sys.path[0]

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from ascendit.device.cpu_threads import set_variables
from ascendit.version import __version__

if TYPE_CHECKING:
    from ascendit.convert.quantize import quantize
    from ascendit.convert.repack import repack
    from ascendit.errors import AscenditError
    from ascendit.inspect.checkpoint import inspect
    from ascendit.model.quantize_module import quantize_
    from ascendit.pipeline.generate import Pipeline
    from ascendit.pipeline.job import load
    from ascendit.pipeline.request import GenerateRequest
    from ascendit.pipeline.sheet import contact_sheet
    from ascendit.pipeline.video import Video

_MODULES = {
    "AscenditError": "ascendit.errors",
    "GenerateRequest": "ascendit.pipeline.request",
    "Pipeline": "ascendit.pipeline.generate",
    "Video": "ascendit.pipeline.video",
    "contact_sheet": "ascendit.pipeline.sheet",
    "inspect": "ascendit.inspect.checkpoint",
    "load": "ascendit.pipeline.job",
    "quantize": "ascendit.convert.quantize",
    "quantize_": "ascendit.model.quantize_module",
    "repack": "ascendit.convert.repack",
}

set_variables()

_PACKAGES = ("mx",)  # also reached as `ascendit.mx.encode`, without importing the package
_RENAMED = {"spec": "family"}
"""Former name of a module -> its name; the former name still works, with a DeprecationWarning."""

for _folder in (
    "inspect",
):  # has the name of a function: imported first, so that a later import cannot hide the function
    importlib.import_module(f"ascendit.{_folder}")
    del globals()[_folder]

__all__ = [
    "AscenditError",
    "GenerateRequest",
    "Pipeline",
    "Video",
    "__version__",
    "contact_sheet",
    "inspect",
    "load",
    "quantize",
    "quantize_",
    "repack",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"ascendit.{name}")
    if name in _RENAMED:
        warnings.warn(
            f"ascendit.{name} was renamed to ascendit.{_RENAMED[name]}", DeprecationWarning, stacklevel=2
        )
        return importlib.import_module(f"ascendit.{_RENAMED[name]}")
    if name not in _MODULES:
        error = importlib.import_module("ascendit.arguments").attribute_error
        raise error("module 'ascendit'", name, __all__)
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
