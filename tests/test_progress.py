"""Speed and time to go of a conversion."""

import subprocess
import sys

import pytest

from ascendit.progress import ConversionProgress


def test_speed_and_time_to_go() -> None:
    progress = ConversionProgress("transformer", "blocks.0.ffn.net.2.weight", 3 << 30, 12 << 30, 2.0)
    assert progress.gib_per_s == 1.5
    assert progress.eta == 6.0


def test_nothing_is_known_at_the_start() -> None:
    progress = ConversionProgress("transformer", "", 0, 1 << 30, 0.0)
    assert progress.gib_per_s == 0.0
    assert progress.eta is None


def test_the_first_percent_says_nothing_about_the_rest() -> None:
    """Opening files and loading code takes longer than the first bytes."""
    assert ConversionProgress("transformer", "w", 9 << 20, 1000 << 20, 0.3).eta is None
    assert ConversionProgress("transformer", "w", 10 << 20, 1000 << 20, 0.3).eta == pytest.approx(29.7)
    assert (
        ConversionProgress("transformer", "w", 501 << 20, 1000 << 20, 0.3, skipped_bytes=500 << 20).eta
        is None
    )


def test_bytes_of_a_killed_run_are_not_counted_as_speed() -> None:
    progress = ConversionProgress("transformer", "w", 9 << 30, 12 << 30, 2.0, skipped_bytes=5 << 30)
    assert progress.gib_per_s == 2.0
    assert progress.eta == 1.5
    assert ConversionProgress("transformer", "w", 5 << 30, 12 << 30, 0.1, skipped_bytes=5 << 30).eta is None


@pytest.mark.parametrize("total", [0, 7])
def test_at_the_end_nothing_is_left(total: int) -> None:
    assert ConversionProgress("check", "w", total, total, 1.0).eta == 0.0


def test_it_is_light() -> None:
    code = "import ascendit.progress, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
