"""Files that are not LoRA files, and unsupported settings of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert.loras import save, shapes

from ascendit.errors import AscenditError, CheckpointError, UsageError
from ascendit.weights.lora.fields import Patterns
from ascendit.weights.lora.fold import Folds, LoraSource

KEY = "transformer.blocks.0.attn1.to_q"
PAIR = {f"{KEY}.lora_A.weight": torch.ones(2, 24), f"{KEY}.lora_B.weight": torch.ones(24, 2)}


def error(path: Path, code: str) -> AscenditError:
    with pytest.raises(AscenditError) as e:
        Folds.open([LoraSource(path)], "transformer", shapes())
    assert e.value.code == code
    assert str(path) in e.value.got
    return e.value


def test_no_file(tmp_path: Path) -> None:
    problem = error(tmp_path / "hihg=a.safetensors", "E-USE-02")
    assert "transformer_2=FILE" in problem.needs


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_a_pickle_is_refused_without_reading_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"cos\nsystem\n")
    problem = error(path, "E-USE-01")
    assert isinstance(problem, UsageError)
    assert "a pickle can run arbitrary code" in problem.got
    assert "safetensors.torch.save_file" in problem.fix


def test_a_folder_of_several_files_is_refused_and_they_are_listed(tmp_path: Path) -> None:
    assert "is a folder" in error(tmp_path, "E-USE-01").got
    for name in ("high", "low"):
        save(tmp_path / f"{name}.safetensors", PAIR)
    assert "is a folder with high.safetensors, low.safetensors" in error(tmp_path, "E-USE-01").got
    path = save(tmp_path / "adapter_model.safetensors", PAIR).path
    assert LoraSource(tmp_path).path == path


def test_another_file_extension(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "is not a .safetensors file" in error(tmp_path / "a.gguf", "E-USE-01").got


def test_a_damaged_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", PAIR).path
    path.write_bytes(path.read_bytes()[:-4])
    assert isinstance(error(path, "E-CKP-02"), CheckpointError)


def test_no_tensors(tmp_path: Path) -> None:
    assert "has no tensors" in error(save(tmp_path / "a.safetensors", {}).path, "E-LRA-01").got


SETTINGS = {
    "not JSON": ("{", "not JSON"),
    "nested too deep": ("[" * 100_000, "not JSON"),
    "dora": ({"transformer.use_dora": True}, "DoRA is not supported"),
    "ia3": ({"transformer.peft_type": "IA3"}, "PEFT's IA3 is not supported"),
    "lokr with several ranks": (
        {"peft_type": "LOKR", "rank_pattern": {"to_q": 8}},
        "LoKr with several ranks is not supported",
    ),
    "not an object": ("3", "lora_adapter_metadata = 3 is not an object"),
    "a text": ('"r = 4"', "not JSON"),
    "rslora is unclear": ({"lora_alpha": 1, "use_rslora": "maybe"}, "use_rslora = 'maybe'"),
    "alpha is a text": ({"transformer.lora_alpha": "eight"}, "lora_alpha = 'eight'"),
    "alpha is nan": ('{"transformer.lora_alpha": NaN}', "lora_alpha = nan"),
    "alpha is zero": ({"transformer.lora_alpha": 0}, "lora_alpha = 0"),
    "pattern is a list": (
        {"transformer.lora_alpha": 1, "transformer.alpha_pattern": [1]},
        "alpha_pattern = [1]",
    ),
    "pattern is slow to match": (
        {"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(a+)+": 1}},
        "'(a+)+' is too complex",
    ),
    "pattern is not an expression": (
        {"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"[a": 1}},
        "'[a' is not a regular expression",
    ),
    "rank is not whole": ({"transformer.r": 2.5}, "r = 2.5 is not a whole number above 0"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "PEFT changed the weights that it was trained on"),
    "pattern without a number": (
        {"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"to_q": None}},
        "'to_q'",
    ),
}


@pytest.mark.parametrize(
    "text", ["(a*)*", "(a|a)" * 30, "a?" * 30, "a*" * 4, r"(.)\1", "(?=a)b", "x" * 501 + "|"]
)
def test_expressions_that_could_take_very_long(text: str) -> None:
    with pytest.raises(ValueError, match="is too complex"):
        Patterns({text: 1.0})


@pytest.mark.parametrize("case", SETTINGS)
def test_unsupported_settings(tmp_path: Path, case: str) -> None:
    settings, message = SETTINGS[case]
    text = settings if isinstance(settings, str) else json.dumps(settings)
    source = save(tmp_path / "a.safetensors", PAIR, {"lora_adapter_metadata": text})
    assert message in error(source.path, "E-LRA-01").got


def test_settings_in_adapter_config(tmp_path: Path) -> None:
    source = save(tmp_path / "adapter_model.safetensors", PAIR)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    assert "DoRA is not supported" in error(source.path, "E-LRA-01").got
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not an object"):
        Folds.open([source], "transformer", shapes())


@pytest.mark.parametrize("settings", ["{}", "[]", '{"text_encoder.lora_alpha": 7}', '{"transformer.r": 2}'])
def test_settings_without_effect(tmp_path: Path, settings: str) -> None:
    source = save(tmp_path / "a.safetensors", PAIR, {"lora_adapter_metadata": settings})
    folds = Folds.open([source], "transformer", shapes())
    after = folds.fold("blocks.0.attn1.to_q.weight", torch.zeros(24, 24), 0)
    assert torch.equal(after, torch.full((24, 24), 2.0))
