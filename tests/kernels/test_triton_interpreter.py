"""Starts the kernel tests once more with TRITON_INTERPRET=1, where they run the Triton kernels on the CPU.

In a process of its own: the variable must be set before Triton is first imported, by whatever test that may be.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_every_kernel_passes_its_tests_under_the_interpreter() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(here), "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=here.parents[1], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 60, done.stdout[-2000:]
