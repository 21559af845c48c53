"""Starts the laws and scores of single plans once more with TRITON_INTERPRET=1, over interpreted Triton kernels.

In a process of its own: the variable must be set before Triton is first imported, by whatever test that may be.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reuse.conftest import INTERPRETED

CHOSEN = (
    "first_layer or where_it_was or triton-40 or everything_recomputed and True or after_p or in_one_plan "
    "or do_not_deviate or check_layer_are_fresh or before_rope "
    "or query_is or received_below and triton-1 or hybrid_is or links_are and 3"
)
"""One test per law and per op that a method needs; the interpreter takes a second for a forward pass."""


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_the_laws_hold_under_the_triton_interpreter() -> None:
    here = Path(__file__).parent
    files = [str(here / "test_laws.py"), str(here / "test_scores.py")]
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", "-k", CHOSEN]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=here.parents[1], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 10, done.stdout[-2000:]
