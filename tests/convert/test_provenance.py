"""The model card, `ascendit.json`, and their command line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ascendit import __version__
from ascendit.checkpoint.layout import Layout
from ascendit.convert import provenance
from ascendit.convert.provenance import ConversionRecord


def layout(root: Path, name: str = "Wan2.2-T2V-A14B") -> Layout:
    return Layout("diffusers", root, name, {}, {})


@pytest.fixture
def record(tmp_path: Path) -> ConversionRecord:
    return ConversionRecord(
        verb="quantize",
        layout=layout(tmp_path),
        model_kind="t2v",
        command="ascendit quantize Wan2.2-T2V-A14B -o small --scheme mxfp8",
        files={"transformer_2/x.safetensors": "b" * 64, "transformer/x.safetensors": "a" * 64},
        schemes={"mxfp8": 800, "bf16": 12},
        bits_per_weight=8.3312,
        recipe={"name": "default", "about": "every linear | of the blocks", "rules": [{"layers": ["*"]}]},
        loras=({"file": "style.safetensors", "weight": 0.5, "expert": "all"},),
        notes=("A paragraph.",),
    )


def front_matter(text: str) -> dict[str, Any]:
    """As a hub reads it."""
    assert text.startswith("---\n")
    return ModelCard(text).data.to_dict()


def test_front_matter_of_the_model_card(record):
    assert front_matter(provenance.model_card(record, "small")) == {
        "base_model": "Wan2.2-T2V-A14B",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["ascendit", "mxfp8"],
    }


def test_a_hub_snapshot_has_its_name_on_the_hub(record, tmp_path):
    root = tmp_path / "models--Wan-AI--Wan2.2-I2V-A14B" / "snapshots" / ("c0ffee" * 7)[:40]
    root.mkdir(parents=True)
    record = replace(record, layout=layout(root), model_kind="i2v")
    front = front_matter(provenance.model_card(record, "small"))
    assert front["base_model"] == "Wan-AI/Wan2.2-I2V-A14B" and front["pipeline_tag"] == "image-to-video"
    assert provenance.ascendit_json(record)["source"]["name"] == f"Wan-AI/Wan2.2-I2V-A14B@{root.name}"
    line = provenance.command_line("quantize", record.layout, Path("/somewhere/small"), {})
    assert line == f"ascendit quantize hf:Wan-AI/Wan2.2-I2V-A14B@{root.name} -o small"


def test_the_licence_of_the_source_is_stated(record, tmp_path):
    text = "---\nlicense: other\nlicense_name: 'wan: licence'\nlanguage: en\n---\n# Wan\nlicense: mit\n"
    (tmp_path / "README.md").write_text(text)
    front = front_matter(provenance.model_card(record, "small"))
    assert front["license"] == "other" and front["license_name"] == "wan: licence"
    assert "language" not in front
    unclosed, listed = b"---\nlicense: [mit\n---\n", b"---\n- license\n---\n"
    for damaged in (b"\xff\xfe no text", unclosed, listed, b"license: mit\n"):
        (tmp_path / "README.md").write_bytes(damaged)
        assert "license" not in front_matter(provenance.model_card(record, "small"))


@pytest.mark.parametrize("name", ["true", "1.0", "a: b", "- x", "it's", "caf\u00e9 #1", "@wan"])
def test_a_name_with_a_meaning_in_yaml_is_quoted(record, tmp_path, name):
    record = replace(record, layout=layout(tmp_path, name))
    assert front_matter(provenance.model_card(record, "small"))["base_model"] == name


def test_the_body_has_recipe_size_lora_and_command(record):
    text = provenance.model_card(record, "small")
    assert "# small\n" in text and "| Recipe | default: every linear \\| of the blocks |" in text
    assert "| Linear layers | 800 mxfp8, 12 bf16 |" in text and "8.33 (transformers" in text
    assert "| LoRA | style.safetensors with weight 0.5 |" in text and "\nA paragraph.\n" in text
    assert f"```bash\n{record.command}\n```" in text and f"| ascendit | {__version__} |" in text


def test_the_record_is_sorted_and_omits_empty_values(record):
    data = provenance.ascendit_json(record)
    assert list(data["files"]) == ["transformer/x.safetensors", "transformer_2/x.safetensors"]
    assert data["made_by"] == f"ascendit {__version__} quantize" and data["version"] == 1
    assert data["bits_per_weight"] == 8.331 and data["recipe"]["rules"] == [{"layers": ["*"]}]
    assert "sha256" in provenance.model_card(record, "small")
    assert "sha256" not in provenance.model_card(replace(record, files={}), "small")
    minimal = provenance.ascendit_json(replace(record, recipe={}, loras=(), details={"checked": True}))
    assert "recipe" not in minimal and "loras" not in minimal and minimal["checked"] is True


def test_neither_file_has_local_paths(record, tmp_path):
    text = provenance.model_card(record, "small") + json.dumps(provenance.ascendit_json(record))
    assert str(tmp_path) not in text and str(Path.home()) not in text


def test_the_command_line_quotes_repeats_and_omits_flags(tmp_path):
    options = {"scheme": "mxfp8", "recipe": None, "keep": ["blocks.0.*", "a b"], "copy": True, "force": False}
    line = provenance.command_line("quantize", layout(tmp_path, "My model"), tmp_path / "x y", options)
    assert line == (
        "ascendit quantize 'My model' -o 'x y' --scheme mxfp8 --keep 'blocks.0.*' --keep 'a b' --copy"
    )


def test_both_files_are_written(record, tmp_path):
    provenance.write_record_and_card(tmp_path, record, "small")
    assert (tmp_path / "README.md").read_text() == provenance.model_card(record, "small")
    assert json.loads((tmp_path / "ascendit.json").read_text()) == provenance.ascendit_json(record)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "part")
    provenance.write_record_and_card(tmp_path, record, "small", hash=True)
    data = json.loads((tmp_path / "ascendit.json").read_text())
    assert data["sizes"] == {"part/a.json": 2}
    assert data["files"] == {**record.files, "part/a.json": hashlib.sha256(b"{}").hexdigest()}


def test_the_next_command_names_the_published_base():
    config = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "in_channels": 36}
    config |= {"image_dim": 1280, "pos_embed_seq_len": 514}
    source: Any = SimpleNamespace(name="x", experts=[None])
    base = "hf:Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"
    command = f"ascendit repack /o -o /o-full --base {base}"
    assert provenance.next_command(Path("/o"), config, source, is_pipeline=False) == command
    source.experts = []
    assert provenance.next_command(Path("/o"), config, source, is_pipeline=False).endswith("--base MODEL")
