"""Config values of every part: published ones are accepted, invalid ones refused with key, value and rule."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.test_part_tensors import CLIP_H, UMT5_XXL, WAN21_VAE, WAN22_VAE
from safetensors.torch import load_file, save_file
from wan_files import umt5_name, vae_name

from ascendit.checkpoint import tokenizer_check
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.layout_check import check_layout
from ascendit.checkpoint.part_check import check_part
from ascendit.checkpoint.part_configs import (
    AutoencoderConfig,
    ImageEncoderConfig,
    ImageProcessorConfig,
    IndexConfig,
    PartConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TokenizerConfig,
    TokenMapConfig,
    TransformerConfig,
)
from ascendit.checkpoint.part_tensors import autoencoder_tensors, image_encoder_tensors, text_encoder_tensors
from ascendit.errors import CheckpointError
from ascendit.family import VaeConfig, WanConfig
from ascendit.pipeline.job import load, prepare_model
from ascendit.pipeline.options import LoadOptions

FILE = Path("some/config.json")
UMT5, VAE, CLIP = "text_encoder", "vae", "image_encoder"
INF, NAN = float("inf"), float("nan")
NOT_COUNTS: tuple[Any, ...] = (True, "1", 1.0, 0, -1, 2**31, 10**400, None, [], {}, NAN, INF)
"""Values that are no size; a number and null are valid in some keys."""

Read = Callable[[dict[str, Any]], PartConfig]


def refused(config: type[PartConfig], values: dict[str, Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as e:
        config.read(FILE, values)
    assert e.value.code == "E-CKP-06" and "some/config.json: " in e.value.got, e.value
    assert len(e.value.got) < 200 and "restore the config.json" in e.value.fix
    return e.value


def test_the_transformer_has_the_keys_and_defaults_of_the_model() -> None:
    ours = TransformerConfig().model_dump() | {"patch_size": (1, 2, 2)}
    assert WanConfig(**ours) == WanConfig()
    vae = AutoencoderConfig().model_dump()
    assert VaeConfig.from_dict(vae) == VaeConfig()


PUBLISHED: list[tuple[type[PartConfig], dict[str, Any]]] = [
    (AutoencoderConfig, WAN21_VAE),
    (AutoencoderConfig, WAN22_VAE),
    (TextEncoderConfig, UMT5_XXL),
    (ImageEncoderConfig, CLIP_H),
    (IndexConfig, {"boundary_ratio": 0.875, "expand_timesteps": False, "vae": ["diffusers", "x"]}),
    (SchedulerConfig, {"flow_shift": 3, "disable_corrector": [], "trained_betas": None, "solver_p": None}),
    (ImageProcessorConfig, {"size": 224, "crop_size": {"height": 224, "width": 224}, "resample": 3}),
    (TransformerConfig, {"image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514}),
    (TokenizerConfig, {"model_max_length": 10**30, "sp_model_kwargs": {}, "legacy": False, "extra_ids": 300}),
    (TokenMapConfig, {"pad_token": {"content": "<pad>", "lstrip": False}, "eos_token": "</s>"}),
]


@pytest.mark.parametrize(("config", "values"), PUBLISHED)
def test_published_values_and_unknown_keys_are_accepted(
    config: type[PartConfig], values: dict[str, Any]
) -> None:
    assert config.read(FILE, values) == config.read(FILE, values | {"key_of_a_later_version": {"a": [NAN]}})


def sizes() -> Iterator[tuple[type[PartConfig], str]]:
    """Every key that is a size, of every part."""
    for config, values in ((AutoencoderConfig, WAN22_VAE), (TextEncoderConfig, UMT5_XXL)):
        yield from ((config, key) for key, value in values.items() if type(value) is int)
    yield from ((ImageEncoderConfig, key) for key, value in CLIP_H.items() if type(value) is int)
    yield from ((TransformerConfig, key) for key in ("num_layers", "text_dim", "freq_dim", "in_channels"))


IGNORED = {"num_decoder_layers"}


@pytest.mark.parametrize(("config", "key"), [pair for pair in sizes() if pair[1] not in IGNORED])
def test_sizes(config: type[PartConfig], key: str) -> None:
    for value in NOT_COUNTS:
        if value is not None or config.model_fields[key].default is not None:
            refused(config, {key: value})


def each(config: type[PartConfig], key: str, *values: Any) -> list[tuple[type[PartConfig], str, Any]]:
    return [(config, key, value) for value in values]


WRONG: list[tuple[type[PartConfig], str, Any]] = [
    *each(TransformerConfig, "patch_size", 1, None, [1, 2], [1, 2, 0], [1, 2, "2"]),
    *each(TransformerConfig, "eps", "x", -1, NAN, 0, 1),
    *each(TransformerConfig, "qk_norm", None, "rms_norm", 3),
    *each(TransformerConfig, "attention_head_dim", {}, 7, 4),
    *each(TransformerConfig, "cross_attn_norm", 1, "yes"),
    *each(TransformerConfig, "added_kv_proj_dim", 5120, 3),
    *each(AutoencoderConfig, "latents_mean", [], [0.0] * 15, ["x"] * 16, [INF] * 16),
    *each(AutoencoderConfig, "latents_std", [0.0] * 16, [-1.0] * 16, "x"),
    *each(AutoencoderConfig, "dim_mult", [], [0, 1], [1, 2, 2], [1] * 9, "x"),
    *each(AutoencoderConfig, "temperal_downsample", [1, 0, 0], [True], None),
    *each(AutoencoderConfig, "attn_scales", [1.0], "x"),
    *each(AutoencoderConfig, "scale_factor_spatial", "x", 16, None),
    (AutoencoderConfig, "scale_factor_temporal", 0),
    (AutoencoderConfig, "num_res_blocks", 10**9),
    *each(AutoencoderConfig, "is_residual", 1, "x"),
    *each(TextEncoderConfig, "feed_forward_proj", "gated-", "nope", [1], "gated-a-b"),
    *each(TextEncoderConfig, "dense_act_fn", "relu", 3),
    *each(TextEncoderConfig, "is_gated_act", False, 1),
    *each(TextEncoderConfig, "relative_attention_max_distance", 0, 8),
    (TextEncoderConfig, "relative_attention_num_buckets", 3),
    (TextEncoderConfig, "layer_norm_epsilon", INF),
    (TextEncoderConfig, "is_decoder", True),
    (TextEncoderConfig, "num_layers", 10**9),
    *each(ImageEncoderConfig, "hidden_act", "nope", None),
    *each(ImageEncoderConfig, "patch_size", 225, [14, 14]),
    (ImageEncoderConfig, "num_attention_heads", 7),
    (ImageEncoderConfig, "num_channels", 1),
    *each(ImageProcessorConfig, "size", "x", {}, {"height": 3}, {"longest_edge": 3}, 0),
    *each(ImageProcessorConfig, "crop_size", None, {"shortest_edge": 3}),
    *each(ImageProcessorConfig, "image_std", [0, 1, 1], [1, 1]),
    *each(ImageProcessorConfig, "resample", 6, "x"),
    (ImageProcessorConfig, "rescale_factor", NAN),
    *each(SchedulerConfig, "flow_shift", "x", NAN, 0, -3, True, 10**400),
    (SchedulerConfig, "use_karras_sigmas", "no"),
    *each(IndexConfig, "boundary_ratio", "x", [1], True, 0, 1, NAN),
    (IndexConfig, "expand_timesteps", "x"),
    *each(TokenizerConfig, "pad_token", 5, {"content": 5}, {"content": "x", "y": 1}, []),
    *each(TokenizerConfig, "padding_side", "left", None),
    *each(TokenizerConfig, "extra_ids", 10**9, "x"),
    *each(TokenizerConfig, "extra_special_tokens", [1], 3, {"a": 1}),
    *each(TokenizerConfig, "added_tokens_decoder", {"x": "a"}, {"1": 1}, []),
]


@pytest.mark.parametrize(("config", "key", "value"), WRONG)
def test_invalid_values(config: type[PartConfig], key: str, value: Any) -> None:
    assert key in str(refused(config, {key: value}))


def test_an_error_names_key_value_and_rule() -> None:
    error = refused(AutoencoderConfig, {"z_dim": 8})
    assert error.got.startswith("some/config.json: latents_mean is [-0.7571, ")
    assert error.needs == "latents_mean: 8 numbers, as z_dim says, not 16"
    error = refused(TextEncoderConfig, {"d_model": 10**400})
    assert error.needs == "d_model: less than 2147483648"


# ---- folders ------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_i2v_21: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_i2v_21, tmp_path / "m"))


def problem(folder: Path) -> CheckpointError:
    """The only problem of a folder, which also loading reports."""
    [first] = check_layout(recognise(folder)).problems
    with pytest.raises(CheckpointError) as e:
        prepare_model(LoadOptions(model=str(folder)))
    assert (e.value.code, e.value.got) == (first.code, first.got)
    return e.value


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched", "not floating point"])
def test_tensors_are_compared_with_the_config(copy: Path, part: str, damage: str) -> None:
    [file] = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if weights[name].ndim > 1 and "shared" not in name)
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights[name := "no.such.weight"] = torch.zeros(2)
    elif damage == "mismatched":
        weights[name] = weights[name][:-1].clone()
    else:
        weights[name] = weights[name].to(torch.int8)
    save_file(weights, file, metadata={"format": "pt"})
    error = problem(copy)
    assert error.code == "E-CKP-04" and damage in error.got and name in error.got


def test_names_of_other_versions_of_the_library_are_accepted(copy: Path) -> None:
    """A tied embedding under its other name; CLIP with a prefix, and with a constant that is ignored."""
    file = copy / "text_encoder/model.safetensors"
    weights = load_file(file)
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights, file, metadata={"format": "pt"})
    file = copy / "image_encoder/model.safetensors"
    weights = {f"vision_model.{name}": tensor for name, tensor in load_file(file).items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, file, metadata={"format": "pt"})
    assert not check_layout(recognise(copy)).problems
    load(str(copy))


def test_keys_that_change_the_library_do_not_reach_it(copy: Path, tiny_i2v_21: Path) -> None:
    change(copy / "text_encoder/config.json", return_dict=False, pruned_heads={"0": [0]}, dtype="x")
    change(copy / "image_encoder/config.json", return_dict=False, _attn_implementation="x")
    change(copy / "vae/config.json", _use_default_values=["z_dim", "base_dim"])
    changed, original = load(str(copy)), load(str(tiny_i2v_21))
    assert torch.equal(changed.text.encode(["a"], 8)[0], original.text.encode(["a"], 8)[0])
    assert changed.vae.z_dim == original.vae.z_dim


def test_processed_images_have_the_size_of_the_encoder(copy: Path) -> None:
    change(copy / "image_processor/preprocessor_config.json", crop_size=16)
    error = problem(copy)
    assert error.code == "E-CKP-07" and "16x16" in error.got and "image_size 32" in error.got


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
    "pair": [],
}
TOKENIZER: list[tuple[str, Any, str]] = [
    ("tokenizer.json", {"model": {}}, "tokenizer.json: "),
    ("tokenizer.json", {"added_tokens": 3}, "tokenizer.json: "),
    ("tokenizer.json", {"post_processor": {**TEMPLATE, "special_tokens": {}}}, "post_processor is '</s>'"),
    ("tokenizer.json", {"post_processor": {"type": "Sequence", "processors": [TEMPLATE]}}, "post_processor"),
    ("tokenizer.json", {"post_processor": {**TEMPLATE, "single": 5}}, "tokenizer.json: "),
    ("tokenizer_config.json", {"pad_token": None}, "pad_token is None"),
    ("tokenizer_config.json", {"pad_token": "no"}, "pad_token is 'no'"),
    ("special_tokens_map.json", {"pad_token": 3}, "pad_token is 3"),
    ("special_tokens_map.json", {"pad_token": None}, "pad_token is None"),
    ("added_tokens.json", {"a": -1}, "a is -1"),
]


@pytest.mark.parametrize(("name", "values", "text"), TOKENIZER)
def test_files_of_a_tokenizer(copy: Path, name: str, values: Any, text: str) -> None:
    file = copy / "tokenizer" / name
    if file.exists():
        change(file, **values)
    else:
        file.write_text(json.dumps(values))
    error = problem(copy)
    assert error.code == "E-CKP-06" and text in error.got


def test_other_files_beside_a_tokenizer_are_not_read(copy: Path) -> None:
    (copy / "tokenizer/notes.json").write_text("{")
    assert not check_layout(recognise(copy)).problems


def test_a_tokenizer_without_a_vocabulary(copy: Path) -> None:
    (copy / "tokenizer/tokenizer.json").unlink()
    assert problem(copy).code == "E-CKP-02"


def with_token(number: int, where: str) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> None:
        if where == "vocab":
            data["model"]["vocab"]["q"] = number
        elif where == "post_processor":
            data["post_processor"]["special_tokens"]["</s>"]["ids"] = [number]
        else:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            data["added_tokens"].append({"id": number, "content": "<new>", "special": True, **flags})

    return change


@pytest.mark.parametrize("where", ["vocab", "post_processor", "added_tokens"])
@pytest.mark.parametrize("number", [5000, 2**32 - 1])
def test_a_token_without_an_embedding(copy: Path, where: str, number: int) -> None:
    """A tokenizer of another model, with more tokens than the text encoder has embeddings."""
    file = copy / "tokenizer/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    with_token(number, where)(tokenizer)
    file.write_text(json.dumps(tokenizer))
    error = problem(copy)
    assert error.code == "E-CKP-07" and str(number) in error.got


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
SLOW: list[tuple[str, Any]] = [
    ("normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 26}),
    ("normalizer", DOUBLE),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 9}),
    ("normalizer", {"type": "ByteLevel"}),
    ("pre_tokenizer", BACKTRACKING),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}),
    ("post_processor", {"type": "Sequence", "processors": [TEMPLATE] * 2}),
]


@pytest.mark.parametrize(("key", "value"), SLOW)
def test_a_tokenizer_that_would_not_end(
    copy: Path, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before the library sees it."""
    monkeypatch.setattr(tokenizer_check, "_try_tokenizer", lambda file: pytest.fail("tokenized"))
    change(copy / "tokenizer/tokenizer.json", **{key: value})
    error = problem(copy)
    assert error.code == "E-CKP-06" and f"tokenizer.json: {key} is" in error.got


def test_faults_that_only_a_prompt_shows(copy: Path) -> None:
    file = copy / "tokenizer/tokenizer.json"
    content = file.read_text()
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert "byte order mark" in problem(copy).got
    data = json.loads(content)
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 100}
    file.write_text(json.dumps(data | {"truncation": truncation}))
    assert "truncation.stride is 100" in problem(copy).got
    file.write_text(json.dumps(data | {"model": data["model"] | {"unk_token": "<no>"}}))
    assert "unk_token is '<no>'" in problem(copy).got


def test_a_large_vocabulary_is_not_parsed_before_loading(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = copy / "tokenizer/tokenizer.json"
    monkeypatch.setattr(tokenizer_check, "LARGE", 10)
    monkeypatch.setattr(tokenizer_check, "_try_tokenizer", lambda file: pytest.fail("tokenized"))
    assert not check_layout(recognise(copy)).problems
    file.write_text(file.read_text().replace('"unk_token"', '"x"'))
    assert problem(copy).code == "E-CKP-06"


def test_an_unknown_class(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    change(copy / "model_index.json", text_encoder=["transformers", "BertModel"])
    assert index["text_encoder"] != ["transformers", "BertModel"]
    with pytest.raises(CheckpointError) as e:
        for part in recognise(copy).parts.values():
            check_part(part)
    assert e.value.code == "E-CKP-05"


def test_deep_nesting(copy: Path) -> None:
    for depth in (99, 101, 900, 100_000):
        text = "[" * depth + "]" * depth
        file = copy / "vae/config.json"
        content = file.read_text()
        file.write_text(content.replace("{", f'{{"x": {text},', 1))
        if depth == 99:
            assert not check_layout(recognise(copy)).problems
        else:
            with pytest.raises(CheckpointError) as e:
                recognise(copy)
            assert e.value.code == "E-CKP-06"
        file.write_text(content)


# ---- single files -------------------------------------------------------------------------------


def empty_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A sparse safetensors file of BF16 zeros."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + position)
    return path


SINGLE = {
    "umt5": (UMT5, text_encoder_tensors(TextEncoderConfig(**UMT5_XXL)), umt5_name),
    "vae of Wan2.1": (VAE, autoencoder_tensors(AutoencoderConfig(**WAN21_VAE)), None),
    "vae of Wan2.2": (
        VAE,
        autoencoder_tensors(AutoencoderConfig(**WAN22_VAE)),
        lambda n: vae_name(n, WAN22_VAE),
    ),
    "clip": (CLIP, image_encoder_tensors(ImageEncoderConfig(**CLIP_H)), None),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_is_compared_with_the_published_model(name: str, tmp_path: Path) -> None:
    part, shapes, rename = SINGLE[name]
    shapes = {rename(key): shape for key, shape in shapes.items()} if rename else dict(shapes)
    layout = recognise(empty_file(tmp_path / "x.safetensors", shapes))
    assert list(layout.parts) == [part] and check_part(layout.part(part)) is not None
    shapes.popitem()
    empty_file(tmp_path / "x.safetensors", shapes)
    with pytest.raises(CheckpointError, match="missing keys") as e:
        check_part(layout.part(part))
    assert e.value.code == "E-CKP-04"
    empty_file(
        tmp_path / "x.safetensors", {key: tuple(2 * n for n in shape) for key, shape in shapes.items()}
    )
    with pytest.raises(CheckpointError, match="sizes of no published") as e:
        check_part(layout.part(part))
    assert e.value.code == "E-CKP-06" and "--base MODEL" in e.value.fix
