"""Names of output files: prompts in any script, and names of many videos."""

from __future__ import annotations

import time
import unicodedata
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wan_defaults import SINGLE

from ascendit.errors import UNSAFE, UsageError
from ascendit.pipeline.output_names import _different, default_name, names_of, slug
from ascendit.pipeline.request import MAX_SEED, GenerateRequest, resolve

WHEN = datetime(2026, 11, 20, 19, 30, 12)


def test_default_name() -> None:
    assert default_name("A calico cat, on the piano!", 42, WHEN) == Path(
        "outputs/20261120-193012_calico-cat-piano_s42.mp4"
    )
    assert default_name("红色的圆", 3, WHEN).name == "20261120-193012_红色的圆_s3.mp4"
    assert default_name("🐱🐱", 3, WHEN).name == "20261120-193012_video_s3.mp4"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Élan vital", "elan-vital"),
        ("../../etc/passwd", "etc-passwd"),
        ("红色的圆 é", "红色的圆-e"),
        ("红色的圆，向右移动。", "红色的圆-向右移动"),
        ("ＡＢＣ　１２", "abc-12"),
        ("がぎ ガラス", "がぎ-ガラス"),
        ("한국어 고양이", "한국어-고양이"),
        ("Кошка на пианино", "кошка-на-пианино"),
        ("قطة تعزف", "قطة-تعزف"),
        ("حَرَكَة", "حَرَكَة"),
        ("बिल्ली पियानो", "बिल्ली-पियानो"),
        ("แมวเล่นเปียโน", "แมวเล่นเปียโน"),
        ("đàn ếch", "đan-ech"),
        ("İstanbul ışık", "istanbul-ısık"),
        ("a\u202egpj.exe\u202c b", "agpj-exe-b"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("cat 🐱 ❤\ufe0f 1\ufe0f\u20e3", "cat-1"),
        ("a\x00b\nc\td", "b-c-d"),
        ("\u0301\u0301", ""),
        ("\u3164\u115f", ""),
        ("🐱", ""),
        ("", ""),
        ("the of a", ""),
        ("\ud800", ""),
        ("x" * 99, "x" * 40),
        ("猫" * 99, "猫" * 32),
        ("red circle moving " * 9, "red-circle-moving-red-circle-moving-red"),
    ],
)
def test_slugs(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@given(st.text(max_size=60))
def test_a_name_is_safe_and_fits_every_file_system(prompt: str) -> None:
    name = slug(prompt)
    assert len(name) <= 40 and len(name.encode()) <= 96
    assert name == unicodedata.normalize("NFC", name) and not UNSAFE.search(name)
    assert all(c == "-" or unicodedata.category(c)[0] in "LNM" for c in name)
    assert not name or unicodedata.category(name[0])[0] != "M"
    assert not (name.startswith("-") or name.endswith("-") or "--" in name)
    assert len(default_name(prompt, MAX_SEED, WHEN).name.encode()) <= 143


def test_a_file_system_without_these_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert default_name("红色的圆", 3, WHEN).name == "20261120-193012_video_s3.mp4"


def requests(*pairs: tuple[str, int]) -> list[GenerateRequest]:
    return [resolve(SINGLE, prompt, seed=seed) for prompt, seed in pairs]


def test_names_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1.2").mkdir()
    two = requests(("a cat", 1), ("a dog", 1))
    stem = "20261120-193012"
    assert names_of(None, two, [1, 2], WHEN) == [f"outputs/{stem}_cat_s1.mp4", f"outputs/{stem}_dog_s1.mp4"]
    assert names_of("v1.2", two, [1, 2], WHEN)[1] == f"v1.2/{stem}_dog_s1.mp4"
    assert names_of("new/", two, [1, 2], WHEN)[1] == f"new/{stem}_dog_s1.mp4"
    same = requests(("a cat", 1), ("a cat", 1), ("a cat", 1))
    expected = [f"new/{stem}_cat_s1{ending}.mp4" for ending in ("", "-2", "-3")]
    assert names_of("new/", same, [1, 2, 3], WHEN) == expected
    assert names_of("d/a.mp4", two, [1, 1], WHEN)[0] == "d/a_s1.mp4"
    twelve = requests(*(("a cat", i) for i in range(12)))
    assert names_of("a.webm", twelve, list(range(1, 13)), WHEN)[::11] == ["a_01_s0.webm", "a_12_s11.webm"]
    assert names_of("a.mp4", two[:1], [1], WHEN) == ["a.mp4"]
    with pytest.raises(UsageError, match=r"'a\.avi'") as e:
        names_of("a.avi", two, [1, 2], WHEN)
    assert e.value.fix == 'save("a.mp4")'


def test_many_equal_names_take_linear_time() -> None:
    start = time.process_time()
    paths = [Path("d/a-2.mp4"), *[Path("d/a.mp4")] * 5000]
    names = _different(paths)
    assert time.process_time() - start < 1
    assert names[:4] == ["d/a-2.mp4", "d/a.mp4", "d/a-3.mp4", "d/a-4.mp4"] and len({*names}) == 5001
