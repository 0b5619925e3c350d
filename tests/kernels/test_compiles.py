"""The interpreter accepts what the compiler refuses; so the compiler is asked too."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_for_hopper():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
