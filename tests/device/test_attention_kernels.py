"""Requests for attention kernels: their text, names and errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.device.attention_kernels import (
    ATTENTION_KERNELS,
    ATTENTION_KINDS,
    AUTOMATIC,
    attention_name,
    attention_text,
    parse_attention,
)
from ascendit.errors import UsageError
from ascendit.quant.attention_schemes import ATTENTION_FORMATS

NAMES = (AUTOMATIC, *ATTENTION_KERNELS, *ATTENTION_FORMATS)


def test_a_name_alone_is_for_every_kind():
    assert parse_attention("sdpa") == {"self": "sdpa", "text": "sdpa", "image": "sdpa"}
    assert parse_attention("self=laser, cross=sdpa") == {"self": "laser", "text": "sdpa", "image": "sdpa"}
    assert parse_attention("text=fp8") == {"text": "fp8"}


@given(st.dictionaries(st.sampled_from(ATTENTION_KINDS), st.sampled_from(NAMES), min_size=1))
def test_a_request_can_be_parsed_from_its_text(request):
    assert parse_attention(attention_text(request)) == request


def test_texts_are_short():
    assert attention_text(parse_attention("self=sdpa,cross=sdpa")) == "sdpa"
    assert attention_text(parse_attention("image=cpu,text=cpu")) == "cross=cpu"


def test_names_of_other_tools():
    assert parse_attention("self=ascend_laser_attention") == {"self": "laser"}
    assert attention_name("fused_attn_score") == "fusion" and attention_name("sage") == "qk_int8"
    aliases = [alias for row in ATTENTION_KERNELS.values() for alias in row.aliases]
    assert len({*aliases, *NAMES}) == len(aliases) + len(NAMES), "every name has one meaning"


@given(st.text(alphabet="abcdefglnopqrst=, _8", max_size=24))
def test_any_text_is_a_request_or_an_error_with_a_fix(text):
    try:
        request = parse_attention(text)
    except UsageError as e:
        assert e.code == "E-USE-01" and "kinds: self, cross, text, image" in e.needs
        fix = e.fix.partition(", or ")[0].removeprefix("attention=").strip('"')
        assert parse_attention(fix)
    else:
        assert {*request} <= {*ATTENTION_KINDS} and {*request.values()} <= {*NAMES}


OMIT = 'attention="bf16", or omit attention'


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("self=lazer", "'lazer' is no kernel and no scheme", 'attention="self=laser"'),
        ("mine", "'mine' is no kernel and no scheme", OMIT),
        ("both=sdpa", "'both' is no kind of attention", OMIT),
        ("self=sdpa,self=cpu", "self-attention is named twice", OMIT),
        ("sdpa,text=cpu", "text-attention is named twice", OMIT),
        ("", "'' is no kernel and no scheme", OMIT),
        (3, "it has type int, not text", 'attention="self=fp8,cross=bf16"'),
    ],
)
def test_an_invalid_request_is_an_error(text, problem, fix):
    with pytest.raises(UsageError) as e:
        parse_attention(text)
    assert problem in e.value.got and e.value.fix == fix
