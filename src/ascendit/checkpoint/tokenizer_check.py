"""Check a tokenizer: its JSON files, and that `tokenizer.json` tokenizes any text in little time.

Only the steps of T5-like tokenizers are accepted, few of them, and none that can multiply the text again and
again; the library gets no other file.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ascendit.checkpoint.component import CONFIG_FILES, Part, library_refusal, read_json
from ascendit.checkpoint.part_configs import TokenizerConfig, TokenMapConfig, bad_config_value
from ascendit.checkpoint.sources import FileState
from ascendit.checkpoint.trust import TOKENIZER_CONFIGS, TOKENIZER_FILES
from ascendit.errors import CheckpointError

TOKENIZER_KEYS: dict[str, type[TokenMapConfig]] = {
    "tokenizer_config.json": TokenizerConfig,
    "special_tokens_map.json": TokenMapConfig,
}
"""Config file of a tokenizer -> its model, whose keys are the only ones that reach the library."""
MODELS = ("Unigram", "BPE", "WordLevel", "WordPiece")
STEPS = {
    "normalizer": (
        "normalizers",
        "NFC NFD NFKC NFKD Nmt Lowercase Strip StripAccents Prepend Replace Precompiled".split(),
    ),
    "pre_tokenizer": (
        "pretokenizers",
        "WhitespaceSplit Whitespace Metaspace Split Punctuation Digits ByteLevel BertPreTokenizer".split(),
    ),
    "post_processor": (
        "processors",
        "TemplateProcessing BertProcessing RobertaProcessing ByteLevel".split(),
    ),
}
"""Stage of a tokenizer -> key of the steps in a Sequence, and the accepted types of steps."""
ONCE = ("Precompiled", "ByteLevel", "TemplateProcessing")
"""Steps that can make the text longer by a factor, so there is at most one of each in a stage."""
MAX_STEPS = 8
LARGE = 1_000_000
"""The library needs seconds for a `tokenizer.json` above this size in bytes; it parses it when it loads."""


def check_tokenizer(part: Part) -> int | None:
    """Check the JSON files that the library gets; return the largest token, None without `tokenizer.json`.

    Raises CheckpointError: E-CKP-06 for an invalid value or file, E-CKP-02 without a vocabulary. Above
    `LARGE` bytes, faults that only the library's parser sees are left to loading: the merges of BPE, the
    bytes of a Precompiled normalizer, the flags of steps and added tokens.
    """
    folder, names = part.folder, TOKENIZER_CONFIGS
    files = {name: read_json(folder / name) for name in names if os.path.lexists(folder / name)}
    config = TokenizerConfig.read(folder / names[0], part.config)
    special = TokenMapConfig.read(folder / names[1], files.get(names[1], {}))
    if files.get(names[1], {}).get("pad_token", "") is None:  # it replaces that of the config
        raise bad_config_value(folder / names[1], "pad_token", None, "a token of tokenizer.json")
    for token, number in files.get(names[2], {}).items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise bad_config_value(folder / names[2], token, number, "the number of a token")
    file = folder / "tokenizer.json"
    if os.path.lexists(file):
        pads = [
            pad["content"] if isinstance(pad, dict) else pad for pad in (config.pad_token, special.pad_token)
        ]
        default = "pad_token" not in part.config and part.class_name.startswith("T5Tokenizer")
        try:
            state = FileState.of(file.stat())
        except OSError:
            state = None
        declared = tuple(pad for pad in pads if pad)
        largest: int = _vocabulary(
            file, state, declared, folder / CONFIG_FILES["tokenizer"][0], default=default
        )
        more = [*files.get(names[2], {}).values(), *map(int, config.added_tokens_decoder)]
        return int(max([largest, *more]))
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no vocabulary",
            needs=" or ".join(TOKENIZER_FILES),
            fix="download the component again",
            code="E-CKP-02",
        )
    return None


@functools.lru_cache(maxsize=4)
def _vocabulary(
    file: Path, state: FileState | None, pads: tuple[str, ...], config: Path, *, default: bool
) -> int:
    """The largest token of a checked `tokenizer.json`; read once for each state of the file.

    `pads`: declared pad tokens, of the file `config`; `default`: without any, it is `<pad>`.
    """
    data = read_json(file)
    with open(file, "rb") as f:
        start = f.read(3)
    if start == b"\xef\xbb\xbf":
        raise bad_config_value(file, "the first character", "a byte order mark", "JSON without a mark")
    for stage in STEPS:
        _check_steps(file, stage, data.get(stage))
    numbers = _numbers(file, data)
    _check_truncation(file, data.get("truncation"))
    padding = data.get("padding")
    if not pads and isinstance(padding, dict) and isinstance(padding.get("pad_token"), str):
        pads = (padding["pad_token"],)
    if not pads and default:
        pads = ("<pad>",)
    if not pads or any(pad not in numbers for pad in pads):
        raise bad_config_value(config, "pad_token", pads[0] if pads else None, "a token of tokenizer.json")
    if state is None or state.nbytes <= LARGE:
        _try_tokenizer(file)
    return max(numbers.values(), default=0)


def _try_tokenizer(file: Path) -> None:
    """Tokenize as for a prompt, which replaces the stored padding and truncation."""
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("a red circle")
    except BaseException as e:
        raise library_refusal(file, e) from e


def _check_truncation(file: Path, truncation: object) -> None:
    if isinstance(truncation, dict):
        stride, length = truncation.get("stride", 0), truncation.get("max_length", 512)
        if type(stride) is not int or type(length) is not int or not 0 <= stride < max(length, 1):
            raise bad_config_value(file, "truncation.stride", stride, "a number below max_length")


# ---- tokens -------------------------------------------------------------------------------------


def _numbers(file: Path, data: Mapping[str, Any]) -> dict[str, int]:
    """Token -> number, of the vocabulary, the added tokens and the post-processor."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") not in MODELS:
        kind = model.get("type") if isinstance(model, dict) else model
        raise bad_config_value(file, "model.type", kind, f"one of {', '.join(MODELS)}")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list) and model["type"] == "Unigram":
        # Whole columns at a time: a vocabulary has 256,000 pieces.
        pairs = set(map(type, vocabulary)) == {list} and set(map(len, vocabulary)) == {2}
        pieces, scores = zip(*vocabulary, strict=True) if pairs else ((), ())
        if set(map(type, pieces)) != {str} or not set(map(type, scores)) <= {int, float}:
            raise bad_config_value(file, "model.vocab", "another list", "pairs of a piece and its score")
        numbers = dict(zip(pieces, range(len(pieces)), strict=True))
        unknown = model.get("unk_id")
        if type(unknown) is not int or not 0 <= unknown < len(vocabulary):
            raise bad_config_value(file, "model.unk_id", unknown, "the number of a piece")
    elif isinstance(vocabulary, dict) and model["type"] != "Unigram":
        numbers = dict(vocabulary)
        unknown = model.get("unk_token")
        if unknown is not None if model["type"] == "BPE" else True:
            if not isinstance(unknown, str) or unknown not in numbers:
                raise bad_config_value(file, "model.unk_token", unknown, "a token of the vocabulary")
    else:
        raise bad_config_value(file, "model.vocab", type(vocabulary).__name__, "the tokens and their numbers")
    for name, number in (*(() if isinstance(vocabulary, list) else numbers.items()), *_other_tokens(data)):
        if type(number) is not int or not 0 <= number < 2**32:
            raise bad_config_value(file, f"number of {name!r}", number, "the number of a token")
        numbers[name] = max(number, numbers.get(name, 0))
    return numbers


def _other_tokens(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    added = data.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            yield token["content"], token.get("id")
    for step in _objects(data.get("post_processor")):
        table = step.get("special_tokens")
        for name, token in table.items() if isinstance(table, dict) else ():
            ids = token.get("ids") if isinstance(token, dict) else None
            yield from ((name, number) for number in (ids if isinstance(ids, list) else ()))
        for pair in (step.get("sep"), step.get("cls")):
            if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str):
                yield pair[0], pair[1]


def _objects(data: object) -> Iterator[dict[str, Any]]:
    """All objects at any depth."""
    if isinstance(data, dict):
        yield data
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _objects(item)


# ---- steps --------------------------------------------------------------------------------------


def _check_steps(file: Path, stage: str, data: object) -> None:
    """Raise E-CKP-06 for steps that `STEPS` does not allow, or that could take for ever."""
    steps = list(_steps(file, stage, data))
    kinds = [step["type"] for step in steps]
    if len(steps) > MAX_STEPS or any(kinds.count(kind) > 1 for kind in ONCE):
        rule = f"at most {MAX_STEPS} steps, and each of {', '.join(ONCE)} once"
        raise bad_config_value(file, stage, ", ".join(kinds), rule)
    for step in steps:
        pattern, content = step.get("pattern"), step.get("content")
        text, regex = (pattern.get(k) if isinstance(pattern, dict) else None for k in ("String", "Regex"))
        if isinstance(regex, str) and not _simple(regex):
            raise bad_config_value(file, stage, regex, "regular expressions without repeated groups")
        length = len(text) if isinstance(text, str) else 1
        if step["type"] == "Replace" and (not isinstance(content, str) or len(content) > length):
            raise bad_config_value(file, stage, content, "a content that is not longer than its pattern")
        _check_template(file, step)


def _steps(file: Path, stage: str, data: object) -> Iterator[dict[str, Any]]:
    if data is None:
        return
    inner, allowed = STEPS[stage]
    kind = data.get("type") if isinstance(data, dict) else data
    if isinstance(data, dict) and kind == "Sequence" and isinstance(data.get(inner), list):
        for step in data[inner]:
            yield from _steps(file, stage, step)
    elif isinstance(data, dict) and isinstance(kind, str) and kind in allowed:
        yield data
    else:
        raise bad_config_value(file, stage, kind, f"steps of the types {', '.join(allowed)}")


def _simple(regex: str) -> bool:
    """Whether a search takes at most quadratic time: no repeated group, two repetitions in an alternative."""
    repeats = re.compile(r"(?<!\\)[*+]|(?<!\\)\{\d*,")
    return (
        len(regex) <= 500
        and not re.search(r"\)[*+{]|[*+}][*{]|\{\d{4,}|,\d{4,}\}|\\[gk]", regex)
        and all(len(repeats.findall(alternative)) <= 2 for alternative in regex.split("|"))
    )


def _check_template(file: Path, step: Mapping[str, Any]) -> None:
    """Special tokens of a template must be in its table: the library panics when it tokenizes without."""
    table = step.get("special_tokens")
    templates = [step.get(key) for key in ("single", "pair")]
    pieces = [[p for p in t if isinstance(p, dict)] for t in templates if isinstance(t, list)]
    if any(sum("Sequence" in piece for piece in template) > 2 for template in pieces):
        raise bad_config_value(file, "post_processor", "a longer template", "each text once")
    for token in (
        piece["SpecialToken"] for template in pieces for piece in template if "SpecialToken" in piece
    ):
        name = token.get("id") if isinstance(token, dict) else None
        if name is not None and not (isinstance(table, dict) and isinstance(name, str) and name in table):
            raise bad_config_value(file, "post_processor", name, "special tokens that are in special_tokens")
