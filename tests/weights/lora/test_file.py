"""Files that are not LoRA files, and unsupported settings of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.loras import save, shapes

from ascendit.errors import AscenditError, CheckpointError
from ascendit.weights.lora.fields import Patterns
from ascendit.weights.lora.fold import Folds, LoraSource, parse_lora

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


ALPHA = {f"{KEY}.alpha": 4.0}
PICKLES: dict[str, tuple[Any, float]] = {
    "tensors": (PAIR, 2.0),
    "the alpha of the layer": ({**PAIR, **ALPHA}, 4.0),
    "its rsLoRA flag": ({**PAIR, **ALPHA, f"{KEY}.use_rslora_flag": True}, 4 * 2**0.5),
    "one alpha": ({**PAIR, "lora_alpha": 3}, 3.0),
    "an alpha around the tensors": ({"state_dict": PAIR, "alpha": 8, "epoch": 1}, 8.0),
    "a configuration": ({"model": PAIR, "config": {"r": 2, "lora_alpha": 6}}, 6.0),
    "views": ({name: tensor.t().clone().t() for name, tensor in PAIR.items()}, 2.0),
    "a strided difference": ({f"{KEY}.diff": torch.ones(24, 24, 2)[:, :, 0]}, 1.0),
}
"""Name -> contents, and the sum of an element: two products of ones, times alpha / 2."""


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_read_without_running_it(tmp_path: Path, name: str) -> None:
    contents, expected = PICKLES[name]
    torch.save(contents, tmp_path / "adapter_model.bin")
    torch.save({}, tmp_path / "training_args.bin")
    folds = Folds.open([parse_lora(f"{tmp_path}:1.0")], "transformer", shapes())
    zeros = torch.zeros(24, 24, dtype=torch.float64)
    folded = folds.fold(f"{KEY.removeprefix('transformer.')}.weight", zeros, 0)
    torch.testing.assert_close(folded, torch.full_like(zeros, expected), rtol=1e-12, atol=0)


def test_a_strided_table_in_a_pickle(tmp_path: Path) -> None:
    values = torch.arange(288.0).view(24, 12)[:, ::2].t()
    torch.save({"blocks.0.diff_m": values}, tmp_path / "a.pt")
    folds = Folds.open([LoraSource(tmp_path / "a.pt")], "transformer", shapes())
    folded = folds.fold("blocks.0.scale_shift_table", torch.zeros(1, 6, 24), 0)
    assert torch.equal(folded[0], values)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_a_pickle_with_code_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"cos\nsystem\n")
    error(path, "E-CKP-02")
    torch.save({**PAIR, "call": Path}, path)
    assert "nothing of it was run" in error(path, "E-CKP-05").got


def test_numbers_that_are_no_alpha(tmp_path: Path) -> None:
    for i, value in enumerate((True, "x", 10**400, float("nan"), None)):
        torch.save({**PAIR, f"{KEY}.alpha": value}, tmp_path / f"{i}.pt")
        assert "is not a valid scale" in error(tmp_path / f"{i}.pt", "E-LRA-01").got
    torch.save({**PAIR, "blocks.0.attn1.to_k.alpha": 4}, tmp_path / "a.pt")
    assert "the factors that it scales are missing" in error(tmp_path / "a.pt", "E-LRA-01").got


def test_a_folder_of_several_files_is_refused_and_they_are_listed(tmp_path: Path) -> None:
    assert "is a folder" in error(tmp_path, "E-USE-01").got
    for name in ("high", "low"):
        save(tmp_path / f"{name}.safetensors", PAIR)
    problem = error(tmp_path, "E-USE-01")
    assert "is a folder with high.safetensors, low.safetensors" in problem.got
    assert f'loras=["high={tmp_path}/high.safetensors", "low={tmp_path}/low.safetensors"]' in problem.fix
    path = save(tmp_path / "adapter_model.safetensors", PAIR).path
    assert LoraSource(tmp_path).path == path


def test_another_file_extension(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "is not a .safetensors file" in error(tmp_path / "a.gguf", "E-USE-01").got


def test_a_damaged_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", PAIR).path
    path.write_bytes(path.read_bytes()[:-4])
    assert isinstance(error(path, "E-CKP-02"), CheckpointError)


def test_a_pickle_with_the_name_of_a_safetensors_file(tmp_path: Path) -> None:
    torch.save(PAIR, tmp_path / "a.safetensors")
    folds = Folds.open([LoraSource(tmp_path / "a.safetensors")], "transformer", shapes())
    assert folds.names == {"blocks.0.attn1.to_q.weight"}


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
