"""`benchmarks/processes.py` sees how far a run on several processes is from one device, and ends where one of them fails."""

import runpy
import sys
from pathlib import Path

import pytest

PROCESSES = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "processes.py"))
TOY = """
import os, sys, time
from pathlib import Path
import numpy as np

index, out = int(os.environ.get("JAX_PROCESS_ID", 0)), Path(sys.argv[sys.argv.index("--out") + 1])
if sys.argv[1] == "fails" and "JAX_PROCESS_ID" in os.environ:
    sys.exit("no such host" if index == 1 else time.sleep(600))
assert ("JAX_NUM_PROCESSES" in os.environ) <= ("--mesh" in sys.argv)
if index == 0:
    out.mkdir()
    moved = 3e-4 * ("--mesh" in sys.argv) + 4e-4 * ("JAX_NUM_PROCESSES" in os.environ) + 1e-3 * ("SSE4_2" in os.environ.get("XLA_FLAGS", ""))
    np.savez(out / "final.npz", x=np.array([0.6, 0.8 + moved]), labels=np.arange(2))
"""


def test_it_compares_each_run_with_one_device(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TOY)
    PROCESSES["main"](["--", sys.executable, str(tmp_path / "toy.py"), "runs"])
    told = capsys.readouterr().out
    for row in ("| data=2,fsdp=2, one process | x | 3.0e-04 |", "2 processes | x | 7.0e-04 |", "| one device, compiled without AVX | x | 1.0e-03 |"):
        assert row in told
    assert "labels" not in told


def test_it_says_which_process_failed(tmp_path):
    """At once, though the first waits for it."""
    (tmp_path / "toy.py").write_text(TOY)
    with pytest.raises(SystemExit, match=r"ended with status 1: no such host"):
        PROCESSES["main"](["--", sys.executable, str(tmp_path / "toy.py"), "fails"])
