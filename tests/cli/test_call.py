"""From words and layers to a plan; nothing is loaded."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascendit.cli.call import frames_for, make_plan, read_call
from ascendit.errors import UsageError

from .test_main import ENVIRON  # type: ignore[import-not-found]
