"""`benchmarks/kill.py` finds what a kill breaks: files that are not written whole."""

import runpy
import sys
from pathlib import Path

import pytest

KILL = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "kill.py"))
TOY = """
import io, os, sys, tempfile, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save

kind, out = sys.argv[1], Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok=True)
for temporary in out.glob(".*"):
    temporary.unlink()

def write(name, data):
    path = out / name if kind == "in place" else Path(tempfile.mkstemp(dir=out, prefix=f".{name}.")[1])
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        time.sleep(0.05)
        file.write(data[len(data) // 2 :])
    os.replace(path, out / name)

def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()

rows, path = [], out / "state.npz"
if path.exists():
    with np.load(path) as state:
        rows = str(state["history"]).splitlines()
for k in range(4):
    rows = rows if len(rows) > k else [*rows, str(k)]
    write("state.npz", npz(history=np.array("\\n".join(rows))))
write("final.npz", npz(x=np.array([float(row) for row in rows])))
if kind == "weights of a clock":
    write("weights.safetensors", save({"w": np.array([time.time()])}))
"""


def outcome(kind, tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TOY)
    status = KILL["main"](["--moments", "3", "--", sys.executable, str(tmp_path / "toy.py"), kind])
    return status, capsys.readouterr().out


def test_whole_files_and_a_state_of_everything_pass(tmp_path, capsys):
    status, out = outcome("whole", tmp_path, capsys)
    assert status == 0
    assert "3 of 3 kills left whole files and the same end" in out


def test_files_written_in_place_are_found_damaged(tmp_path, capsys):
    status, out = outcome("in place", tmp_path, capsys)
    assert status == 1
    assert "(BadZipFile)" in out


def test_moments_are_spread_and_the_same_for_a_seed():
    drawn = KILL["moments"](20, 30, 0)
    assert drawn == KILL["moments"](20, 30, 0) != KILL["moments"](20, 30, 1)
    timed = [moment.share for moment in drawn if moment.write is None]
    assert [int(10 * share) for share in timed] == list(range(10))
    assert len(drawn) == 20
    assert all(1 <= moment.write <= 30 for moment in drawn if moment.write)


def test_refuses_no_command():
    with pytest.raises(SystemExit):
        KILL["main"](["--moments", "2"])


def test_weights_that_differ_are_found(tmp_path, capsys):
    status, out = outcome("weights of a clock", tmp_path, capsys)
    assert status == 1
    assert "| weights.safetensors |" in out
