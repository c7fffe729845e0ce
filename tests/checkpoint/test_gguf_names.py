"""Names of text encoders in llama.cpp, against the table of the package `gguf`."""

from __future__ import annotations

from pathlib import Path

import gguf
import gguf_files
import pytest
import tiny
import torch

from ascendit.checkpoint.component import Part, read_json
from ascendit.checkpoint.gguf_names import llama_cpp_names
from ascendit.checkpoint.part_check import check_part
from ascendit.checkpoint.part_configs import TextEncoderConfig
from ascendit.checkpoint.part_names import recognise_part
from ascendit.checkpoint.part_tensors import text_encoder_tensors
from ascendit.errors import CheckpointError
from ascendit.model.library_component import load_library_part

BLOCKS = 13


def llama_cpp_name(name: str) -> str:
    """The name in llama.cpp of a tensor of transformers' encoder."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, BLOCKS)
    return f"{names.get_name(name.removesuffix('.weight'))}.weight"


@pytest.mark.parametrize("gated", [True, False])
def test_all_names_of_an_encoder(gated: bool) -> None:
    config = TextEncoderConfig(num_layers=BLOCKS, feed_forward_proj="gated-gelu" if gated else "relu")
    ours = text_encoder_tensors(config)
    theirs = {llama_cpp_name(name): name for name in ours}
    assert len(theirs) == len(ours) and llama_cpp_names(theirs) == theirs
    assert recognise_part(theirs) == "text_encoder"


def test_other_names_are_not_translated() -> None:
    others = [
        "dec.blk.0.attn_q.weight",
        "enc.blk.x.attn_q.weight",
        "enc.blk.0.attn_q.bias",
        "blk.0.attn_q.weight",
    ]
    assert llama_cpp_names([*others, "shared.weight", "token_embd", "enc.blk.0.attn_z.weight"]) == {}
    assert recognise_part(["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight"]) is None


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[Part, dict[str, torch.Tensor], torch.nn.Module]:
    """A text encoder with one GGUF file: its part, the stored values, and the model with these values."""
    model = tiny.text_encoder(0, 100)
    model.config.save_pretrained(tmp_path)
    weights = {n: w for n, w in model.state_dict().items() if n != "encoder.embed_tokens.weight"}
    values = gguf_files.write_model(
        tmp_path / "umt5-Q8_0.gguf",
        {llama_cpp_name(name): weight for name, weight in weights.items()},
        "Q8_0",
        arch="t5encoder",
    )
    stored = {name: values[llama_cpp_name(name)] for name in weights}
    assert {str(value.dtype) for value in stored.values()} == {"torch.bfloat16", "torch.float32"}
    tied = {"encoder.embed_tokens.weight": stored["shared.weight"]}
    model.load_state_dict({name: value.float() for name, value in (stored | tied).items()})
    part = Part(
        "text_encoder", tmp_path, "transformers", "UMT5EncoderModel", read_json(tmp_path / "config.json")
    )
    return part, stored, model.eval()


def test_a_text_encoder_has_the_embeddings_of_the_decoded_weights(encoder) -> None:
    part, stored, model = encoder
    shards = check_part(part)
    assert shards is not None and shards.tensors.keys() == stored.keys()
    loaded = load_library_part(part, shards, torch.float32)
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)


def test_a_missing_tensor_is_named(encoder) -> None:
    part, stored, _ = encoder
    left = {
        llama_cpp_name(name): value for name, value in stored.items() if "layer.0.SelfAttention.q" not in name
    }
    gguf_files.write_model(part.path / "umt5-Q8_0.gguf", left, "Q8_0", arch="t5encoder")
    with pytest.raises(CheckpointError) as e:
        check_part(part)
    assert e.value.code == "E-CKP-04" and "encoder.block.0.layer.0.SelfAttention.q.weight" in e.value.got
