"""Components through the libraries: equal to `from_pretrained`, with no other files or classes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
import transformers
import wan_files
from PIL import Image
from safetensors.torch import load_file, save_file

from ascendit.checkpoint.component import Part
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.part_check import check_part
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.model import library_component
from ascendit.model.library_component import load_library_part, load_processor

VERSIONS = {"_class_name", "_diffusers_version", "transformers_version"}
PROMPTS = ["A red circle <pad> moves", "", "é 猫 <extra_id_3>", "z" * 900]


def reference(part: Part, **options: Any) -> Any:
    library = diffusers if part.library == "diffusers" else transformers
    return getattr(library, part.class_name).from_pretrained(part.path, **options)


def load_part(part: Part, dtype: torch.dtype = torch.float32) -> Any:
    return load_library_part(part, Shards.from_part(part), dtype)


def tokens(tokenizer: Any) -> Any:
    options = {"padding": "max_length", "max_length": 64, "truncation": True, "return_attention_mask": True}
    return tokenizer(PROMPTS, **options).data


@pytest.mark.parametrize(
    ("model", "name"),
    [("i2v_21", "text_encoder"), ("i2v_21", "image_encoder"), ("i2v_21", "vae"), ("ti2v", "vae")],
)
def test_models_are_bit_equal_to_from_pretrained(
    model: str, name: str, tiny_folder: Callable[[str], Path]
) -> None:
    part = recognise(tiny_folder(model)).part(name)
    ours, theirs = load_part(part), reference(part)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert [x.tolist() for x in ours.buffers()] == [x.tolist() for x in theirs.buffers()]
    assert not any(x.is_meta for x in [*ours.parameters(), *ours.buffers()])
    a, b = (dict(m.config) if name == "vae" else m.config.to_dict() for m in (ours, theirs))
    unused = {"is_encoder_decoder", "use_cache"}  # by an encoder
    assert {key for key in b if a.get(key) != b[key]} <= {
        "_name_or_path",
        "architectures",
        *VERSIONS,
        *unused,
    }
    a = ours.state_dict()
    half = load_part(part, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(half[key], a[key].to(torch.bfloat16)) for key in a)


def test_an_image_processor_makes_the_same_pixels(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    part = recognise(tiny_folder("i2v_21")).part("image_processor")
    image = Image.effect_noise((50, 40), 90).convert("RGB")

    def pixels(processor: Any) -> torch.Tensor:
        values: torch.Tensor = processor(images=image, return_tensors="pt").pixel_values
        return values

    expected = pixels(reference(part))
    assert torch.equal(pixels(load_processor(part)), expected)
    nested = {"image_processor": part.config, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert torch.equal(pixels(load_processor(replace(part, path=tmp_path, config=nested))), expected)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Part:
    """A tokenizer with the files and keys of the published Wan folders."""
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁red", *"▁abcdefghijklmnopqrstuvwxyzé猫"]
    vocabulary = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    extra = [f"<extra_id_{i}>" for i in range(9)]
    folder = tmp_path_factory.mktemp("t5")
    vocabulary += [(piece, 0.0) for piece in extra]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=9).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config |= {"sp_model_kwargs": {}, "legacy": True, "model_max_length": 512, "bos_token": "<s>"}
    config |= {"additional_special_tokens": extra, "tokenizer_class": "T5Tokenizer"}
    config["added_tokens_decoder"] = {str(i): {"content": pieces[i], **token} for i in range(3)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"bos_token": {"content": "<s>", **token}, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return Part("tokenizer", folder, "transformers", "T5TokenizerFast", config)


@pytest.mark.parametrize("class_name", ["T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast"])
def test_tokenizers_make_the_same_tokens(t5: Part, class_name: str) -> None:
    part = replace(t5, class_name=class_name)
    ours, theirs = load_processor(part), reference(part)
    assert tokens(ours) == tokens(theirs) and len(ours) == len(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.name_or_path == str(t5.path)


def test_keys_that_name_other_files_do_not_reach_the_library(
    tiny_t2v_single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's readers of files see no path of the checkpoint but the vocabulary."""
    folder = tiny.copy(tiny_t2v_single, tmp_path / "m")
    for name, file, keys in (
        ("text_encoder", "config.json", {"configuration_files": ["config.4.json"], "torch_dtype": "evil"}),
        ("vae", "config.json", {"_name_or_path": "evil/repo"}),
        ("tokenizer", "tokenizer_config.json", {"vocab_file": "/etc/passwd", "init_inputs": ["x"]}),
        ("tokenizer", "special_tokens_map.json", {"chat_template": "{{ x }}", "tokenizer_object": "x"}),
    ):
        path = folder / name / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    (folder / "text_encoder" / "config.4.json").write_text("{")
    layout, expected = recognise(folder), recognise(tiny_t2v_single)
    calls: list[Any] = []
    original = transformers.PreTrainedTokenizerFast.__init__

    def spy(self: Any, *args: Any, **options: Any) -> None:
        calls.append((args, options))
        original(self, *args, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__init__", spy)
    assert tokens(load_processor(layout.part("tokenizer"))) == tokens(reference(expected.part("tokenizer")))
    args, options = calls[0]
    assert args == () and not {"tokenizer_object", "chat_template"} & options.keys()
    assert options["vocab_file"] is None
    for name in ("text_encoder", "vae"):
        a, b = (load_part(x.part(name)).state_dict() for x in (layout, expected))
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_other_weights_in_the_folder_are_not_loaded(tiny_t2v_single: Path, tmp_path: Path) -> None:
    """transformers prefers files with this name to `model.safetensors`, and reads adapters with peft."""
    folder = tiny.copy(tiny_t2v_single, tmp_path / "m")
    part = recognise(folder).part("text_encoder")
    expected = load_part(part).state_dict()
    weights = {
        name: torch.zeros_like(tensor) for name, tensor in load_file(part.path / "model.safetensors").items()
    }
    save_file(weights, part.path / "shard-00001-model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (part.path / "pytorch_model.bin").write_bytes(b"x")
    loaded = load_part(part).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_weights_stay_in_their_file(tiny_t2v_single: Path, tmp_path: Path) -> None:
    """In the stored dtype, the parameters of the text encoder are pages of the file, not copies."""
    folder = tiny.copy(tiny_t2v_single, tmp_path / "m")
    part = recognise(folder).part("text_encoder")
    model = load_part(part)
    [file] = part.path.glob("*.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    with open(file, "r+b") as f:
        f.seek(header)
        f.write(bytes(file.stat().st_size - header))
    assert not any(parameter.any() for parameter in model.parameters())


def test_a_file_that_changed_since_its_header_was_read(tiny_t2v_single: Path, tmp_path: Path) -> None:
    part = recognise(tiny.copy(tiny_t2v_single, tmp_path / "m")).part("text_encoder")
    shards = Shards.from_part(part)
    [file] = part.path.glob("*.safetensors")
    file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="changed since") as e:
        load_library_part(part, shards, torch.float32)
    assert e.value.code == "E-CKP-02"


def test_nothing_but_the_table_is_imported(
    tiny_t2v_single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a part that was not made by `recognise`."""
    (tmp_path / "wan_evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    layout = recognise(tiny_t2v_single)
    for library, class_name in (("wan_evil", "T"), ("transformers", "AutoModel"), ("os", "system")):
        part = replace(layout.part("tokenizer"), library=library, class_name=class_name)
        with pytest.raises(CheckpointError) as e:
            load_processor(part)
        assert e.value.code == "E-CKP-05"
        part = replace(layout.part("vae"), class_name=class_name)
        with pytest.raises(CheckpointError) as e:
            load_part(part)
        assert e.value.code == "E-CKP-05"
    assert "wan_evil" not in sys.modules


def test_every_error_of_a_library_has_a_code(
    tiny_t2v_single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.copy(tiny_t2v_single, tmp_path / "m")
    vocabulary = folder / "tokenizer" / "tokenizer.json"
    for content in ("{", "[]", '{"model": 1}', "", "\0"):
        vocabulary.write_text(content)
        with pytest.raises(CheckpointError) as e:
            load_processor(recognise(folder).part("tokenizer"))
        assert e.value.code == "E-CKP-06" and "\n" not in e.value.got
    vocabulary.unlink()
    with pytest.raises(CheckpointError, match="no vocabulary"):
        load_processor(recognise(folder).part("tokenizer"))
    shutil.copytree(tiny_t2v_single / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    for error in (
        TypeError("a\nb"),
        KeyError("x"),
        AttributeError(""),
        AssertionError(),
    ):

        def fail(part: Part, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(library_component, "library_class", fail)
        for load, name in ((load_processor, "tokenizer"), (load_part, "vae")):
            with pytest.raises(CheckpointError) as e:
                load(recognise(folder).part(name))
            assert e.value.code == "E-CKP-06" and type(error).__name__ in e.value.got


def test_memory_errors_stay_memory_errors(tiny_t2v_single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(part: Part) -> Any:
        raise MemoryError

    monkeypatch.setattr(library_component, "library_class", fail)
    with pytest.raises(MemoryError):
        load_processor(recognise(tiny_t2v_single).part("tokenizer"))


# ---- files under the names of the authors' code -------------------------------------------------


def save_as_published(part: Part, folder: Path) -> Part:
    """The part in `folder`, with its weights in a `.pth` file under the names of the authors' code."""
    shutil.copytree(part.path, folder, ignore=lambda _, names: [n for n in names if "safetensors" in n])
    weights = load_file(next(part.path.glob("*.safetensors")))
    head = weights.pop("visual_projection.weight", None)
    match part.name:
        case "text_encoder":
            weights = {wan_files.umt5_name(name): tensor for name, tensor in weights.items()}
        case "vae":
            weights = {wan_files.vae_name(name, part.config): tensor for name, tensor in weights.items()}
        case _:
            weights = wan_files.clip_state(weights, head=torch.ones(2, 3) if head is None else head.T.clone())
    torch.save(weights, folder / "published.pth")
    return replace(part, path=folder, files=(folder / "published.pth",))


@pytest.mark.parametrize(
    ("model", "name"),
    [("i2v_21", "text_encoder"), ("i2v_21", "image_encoder"), ("i2v_21", "vae"), ("ti2v", "vae")],
)
def test_published_files_are_bit_equal_to_the_folder_of_the_library(
    model: str, name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    part = recognise(tiny_folder(model)).part(name)
    published = save_as_published(part, tmp_path / name)
    shards = check_part(published)
    assert shards is not None
    ours, theirs = (
        load_library_part(published, shards, torch.float32).state_dict(),
        load_part(part).state_dict(),
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_published_image_encoder_has_its_projection(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=12,
    )
    model = transformers.CLIPVisionModelWithProjection(config)
    model.save_pretrained(tmp_path / "library")
    config_of = json.loads((tmp_path / "library" / "config.json").read_text())
    part = Part("image_encoder", tmp_path / "library", "transformers", type(model).__name__, config_of)
    published = save_as_published(part, tmp_path / "published")
    shards = check_part(published)
    assert shards is not None
    state = load_library_part(published, shards, torch.float32).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


@torch.no_grad()
def test_the_names_of_umt5_mean_what_its_authors_compute(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The formulas of `wan/modules/t5.py` on the tensors of the file, for one sequence without a mask."""
    published = save_as_published(recognise(tiny_folder("i2v_21")).part("text_encoder"), tmp_path / "t5")
    w = {name: x.double() for name, x in torch.load(published.files[0], weights_only=True).items()}
    heads, size = published.config["num_heads"], published.config["d_kv"]
    buckets = published.config["relative_attention_num_buckets"] // 2
    ids = torch.arange(2)  # of neighbours, whose distance has a bucket of its own
    distance = ids[None] - ids[:, None]
    bucket = distance.abs() + buckets * (distance > 0)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    x = w["token_embedding.weight"][ids]
    for i in range(published.config["num_layers"]):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        q, k, v = (
            (norm(x, block["norm1.weight"]) @ block[f"attn.{n}.weight"].T).view(2, heads, size) for n in "qkv"
        )
        bias = block["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        attention = (torch.einsum("inc,jnc->nij", q, k) + bias).softmax(-1)
        mixed = torch.einsum("nij,jnc->inc", attention, v).reshape(2, -1)
        x = x + mixed @ block["attn.o.weight"].T
        y = norm(x, block["norm2.weight"])
        gate = torch.nn.functional.gelu(y @ block["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ block["ffn.fc1.weight"].T)) @ block["ffn.fc2.weight"].T
    expected = norm(x, w["norm.weight"])
    shards = check_part(published)
    assert shards is not None
    model = load_library_part(published, shards, torch.float32).double()
    torch.testing.assert_close(model(ids[None]).last_hidden_state[0], expected, atol=1e-5, rtol=1e-5)
