"""Defaults of a folder: its row in `family.py`, the folder's scheduler and index, and where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stored import write_json

from ascendit.checkpoint.layout import recognise
from ascendit.errors import CheckpointError
from ascendit.family import SPECS
from ascendit.pipeline.defaults import Defaults, Source, defaults_for

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
UNIPC = {"_class_name": "UniPCMultistepScheduler", **FLOW}
DPM = {"_class_name": "DPMSolverMultistepScheduler", **FLOW}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def folder(
    root: Path, name: str, scheduler: dict[str, Any] | None = None, *, layers: int | None = None, **index: Any
) -> Path:
    """A pipeline folder with the configs of a published model, without weights."""
    s = SPECS[name]
    root = root / name
    expert: dict[str, Any] = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": s.dim // 64 if s.dim < 256 else s.dim // 128,
        "attention_head_dim": 64 if s.dim < 256 else 128,
        "num_layers": layers or s.num_layers,
        "in_channels": s.in_channels,
        "out_channels": s.out_channels,
        **({"image_dim": 1280} if s.image_cross_attention else {}),
        **({"pos_embed_seq_len": 514} if s.last_frame == "required" else {}),
    }
    spatial = 16 if s.task == "ti2v" else 8
    configs: dict[str, dict[str, Any]] = {
        "transformer": expert,
        "vae": {"_class_name": "AutoencoderKLWan", "scale_factor_spatial": spatial},
    }
    if s.num_experts == 2:
        configs["transformer_2"] = expert
    if s.last_frame == "required":  # CLIP ViT-H: 257 tokens for each picture
        clip = {"_class_name": "CLIPVisionModel", "image_size": 224, "patch_size": 14}
        configs["image_encoder"] = clip
    parts: dict[str, Any] = {
        part: ["transformers" if part == "image_encoder" else "diffusers", str(c["_class_name"])]
        for part, c in configs.items()
    }
    if scheduler is not None:
        parts["scheduler"] = ["diffusers", scheduler["_class_name"]]
        write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    for part, config in configs.items():
        write_json(root / part / "config.json", config)
    pipeline = "WanImageToVideoPipeline" if s.task == "i2v" else "WanPipeline"
    index |= {"expand_timesteps": True} if s.task == "ti2v" else {}
    write_json(root / "model_index.json", {"_class_name": pipeline, **index, **parts})
    return root


def defaults(root: Path, source: Source = "model") -> Defaults:
    return defaults_for(recognise(root), source)


def triple(d: Defaults) -> tuple[Any, ...]:
    return d.solver, d.shift_for(d.width, d.height), d.boundary_ratio


@pytest.mark.parametrize("name", SPECS)
def test_a_folder_that_agrees_says_nothing(name: str, tmp_path: Path) -> None:
    s = SPECS[name]
    index: dict[str, Any] = {"boundary_ratio": s.boundary_ratio} if s.num_experts == 2 else {}
    d = defaults(folder(tmp_path, name, {**UNIPC, "flow_shift": s.flow_shift}, **index))
    assert d.spec is s and d.difference == "" and d.negative_prompt == s.negative_prompt
    assert triple(d) == ("unipc", s.flow_shift, s.boundary_ratio)
    assert defaults(tmp_path / name, "folder").difference == ""
    assert triple(defaults(tmp_path / name, "folder")) == triple(d)


# scheduler, index, folder's solver, shift and boundary, text of the difference
CASES: list[tuple[str, dict[str, Any] | None, dict[str, Any], tuple[Any, ...], str]] = [
    (
        "Wan2.2-T2V-A14B",
        {**UNIPC, "flow_shift": 3.0},
        {},
        ("unipc", 3.0, 0.875),
        "shift 12 (authors of Wan2.2-T2V-A14B); the folder has 3: --defaults folder uses this",
    ),
    ("Wan2.2-T2V-A14B", None, {"boundary_ratio": 0.9}, ("unipc", 12.0, 0.9), "the folder has 0.9: "),
    ("Wan2.2-I2V-A14B", {**EULER, "shift": 5.0}, {}, ("euler", 5.0, 0.9), "the folder has euler: "),
    (
        "Wan2.2-I2V-A14B",
        {**EULER, "shift": 7.0},
        {"boundary_ratio": 0.5},
        ("euler", 7.0, 0.5),
        "solver unipc, shift 5, boundary 0.9 (authors of Wan2.2-I2V-A14B); the folder has euler, 7, 0.5: "
        "--defaults folder uses these",
    ),
    ("Wan2.1-T2V-14B", {**DPM, "flow_shift": 5.0}, {}, ("dpm++", 5.0, None), "the folder has dpm++: "),
    ("Wan2.1-T2V-1.3B", {**UNIPC, "flow_shift": 8.0}, {}, ("unipc", 8.0, None), "the folder has 8: "),
    ("Wan2.1-T2V-1.3B", UNIPC, {}, ("unipc", 1.0, None), "shift 5 (authors of Wan2.1-T2V-1.3B); the folder"),
    (
        "Wan2.1-T2V-1.3B",
        {**EULER, "shift": 8.0, "stochastic_sampling": True},
        {},
        ("renoise", 8.0, None),
        "the folder has renoise, 8: ",
    ),
    ("ascendit-demo", {**UNIPC, "flow_shift": 3.0}, {}, ("unipc", 3.0, 0.875), "the folder has 3: "),
]


@pytest.mark.parametrize(("name", "scheduler", "index", "theirs", "text"), CASES)
def test_a_folder_that_differs_says_so_and_can_be_chosen(
    name: str,
    scheduler: dict[str, Any] | None,
    index: dict[str, Any],
    theirs: tuple[Any, ...],
    text: str,
    tmp_path: Path,
) -> None:
    s, root = SPECS[name], folder(tmp_path, name, scheduler, **index)
    d = defaults(root)
    assert triple(d) == ("unipc", s.flow_shift, s.boundary_ratio)
    assert text in d.difference and "--defaults folder" in d.difference and d.difference in d.sources
    chosen = defaults(root, "folder")
    assert triple(chosen) == theirs and chosen.difference == ""
    assert (chosen.num_inference_steps, chosen.guidance_scale) == (s.num_inference_steps, s.guidance_scale)
    assert "--defaults folder" in chosen.sources[0] and chosen.sources[1].startswith("everything else: ")


def test_the_shift_of_a_folder_holds_for_every_size(tmp_path: Path) -> None:
    root = folder(tmp_path, "Wan2.1-I2V-14B-720P", {**UNIPC, "flow_shift": 9.0})
    assert [defaults(root).shift_for(*size) for size in ((1280, 720), (832, 480))] == [5.0, 3.0]
    assert [defaults(root, "folder").shift_for(*size) for size in ((1280, 720), (832, 480))] == [9.0, 9.0]


@pytest.mark.parametrize("source", ["model", "folder"])
def test_a_model_without_a_row_has_the_values_of_its_folder(source: Source, tmp_path: Path) -> None:
    root = folder(tmp_path, "Wan2.2-T2V-A14B", {**DPM, "flow_shift": 7.0}, layers=7, boundary_ratio=0.8)
    d = defaults(root, source)
    assert d.spec is None and triple(d) == ("dpm++", 7.0, 0.8)
    assert d.negative_prompt == "" and d.difference == ""
    bare = defaults(folder(tmp_path / "bare", "Wan2.1-T2V-14B", layers=7), source)
    assert triple(bare) == ("unipc", 5.0, None) and any("no scheduler" in note for note in bare.sources)


@pytest.mark.parametrize(
    ("scheduler", "code", "text"),
    [
        ({"_class_name": "DDIMScheduler"}, "E-CKP-05", "DDIMScheduler"),
        ({"_class_name": "DPMSolverSinglestepScheduler", **FLOW}, "E-CKP-05", "DPMSolverSinglestepScheduler"),
        (
            {"_class_name": "DPMSolverMultistepScheduler"},
            "E-CKP-06",
            "prediction_type='epsilon', use_flow_sigmas=F",
        ),
        ({**DPM, "solver_order": 3}, "E-CKP-06", "solver_order=3"),
        ({**DPM, "solver_type": "heun"}, "E-CKP-06", "solver_type='heun'"),
        ({**DPM, "algorithm_type": "sde-dpmsolver++"}, "E-CKP-06", "sde-dpmsolver++"),
        ({**DPM, "use_lu_lambdas": True}, "E-CKP-06", "use_lu_lambdas=True"),
        ({**DPM, "final_sigmas_type": "sigma_min"}, "E-CKP-06", "final_sigmas_type='sigma_min'"),
        ({**UNIPC, "solver_type": "bh1"}, "E-CKP-06", "solver_type='bh1'"),
        ({**UNIPC, "use_karras_sigmas": True}, "E-CKP-06", "use_karras_sigmas=True"),
        ({**EULER, "use_dynamic_shifting": True}, "E-CKP-06", "use_dynamic_shifting=True"),
        ({**EULER, "invert_sigmas": True}, "E-CKP-06", "invert_sigmas=True"),
    ],
)
@pytest.mark.parametrize("source", ["model", "folder"])
def test_a_scheduler_that_no_solver_equals_is_refused(
    scheduler: dict[str, Any], code: str, text: str, source: Source, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=text.partition("+")[0]) as error:
        defaults(folder(tmp_path, "Wan2.1-T2V-14B", scheduler), source)
    assert error.value.code == code
