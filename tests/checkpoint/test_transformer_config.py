"""Diffusers configs from original ones, and from shapes alone."""

from pathlib import Path
from typing import Any

import pytest
import stored
from stored import CONFIG, floats, read, refused, wan

EXPORTS = Path(__file__).parents[1] / "fixtures" / "msmodelslim" / "exports"


def test_the_number_of_heads_is_told_where_it_can_be(tmp_path: Path) -> None:
    cascade = read(EXPORTS / "W8A8_DYNAMIC" / "t2v_d64_l6__int8")
    assert cascade.config["num_attention_heads"] is None is cascade.config["attention_head_dim"]
    assert cascade.config_problem is not None
    assert "number of attention heads is unknown" in cascade.config_problem
    wide = CONFIG | {"num_attention_heads": 2, "attention_head_dim": 128}
    expert = read(stored.folder(tmp_path / "a", wan(floats(wide)), config=None))
    assert (expert.config["num_attention_heads"], expert.config_problem) == (2, None)
    rotated = floats() | {f"blocks.0.attn1.{x}_rot": ("BF16", (32, 32)) for x in "qk"}
    assert read(stored.folder(tmp_path / "b", rotated, config=None)).config["num_attention_heads"] == 2


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        ({"dim": 128}, "E-CKP-04", "dim = 128 in config.json, 64 by the shapes"),
        ({"num_layers": 3}, "E-CKP-04", "num_layers = 3 in config.json, 2 by the shapes"),
        ({"in_dim": 36}, "E-CKP-04", "in_channels = 36 in config.json, 16 by the shapes"),
        ({"num_heads": 3}, "E-CKP-06", "num_heads = 3"),
        ({"num_heads": "2"}, "E-CKP-06", "num_heads = '2'"),
        ({"eps": "small"}, "E-CKP-06", "eps = 'small'"),
    ],
)
def test_an_original_config_that_does_not_fit(
    tmp_path: Path, config: dict[str, Any], code: str, words: str
) -> None:
    path = stored.folder(tmp_path, wan(floats()), config={"_class_name": "WanModel", "num_heads": 2} | config)
    assert words in refused(path, code)
