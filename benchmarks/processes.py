"""Runs an experiment on one device, on a mesh of one process, and on the same mesh of several processes, and compares the arrays they leave.

    python benchmarks/processes.py -- python examples/security_audit.py --steps 3 --per-class 2 --rounds 2 --radii 0.2 --engines kept

Of each array x of `final.npz`, and y of the run on one device:  |x - y|_2 / |y|_2  and  max |x - y|. Beside the mesh stands what rounding alone
does: one device again, its program compiled for CPUs without AVX. Devices are forced ones of this CPU, processes meet on loopback (gloo). Prints
a table; judges nothing.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from adjoint_jax.experiments.report import table

DEVICES = "--xla_force_host_platform_device_count"
OLDER = "--xla_cpu_max_isa=SSE4_2"


def ended(command: Sequence[str], out: Path, environments: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
    """Runs the command once in each environment, together, and reads what they leave."""
    own = {**os.environ, "JAX_PLATFORMS": "cpu"}
    logs = [out.with_suffix(f".{i}.log") for i in range(len(environments))]
    processes = []
    for log, more in zip(logs, environments, strict=True):
        with log.open("wb") as file:
            processes.append(subprocess.Popen([*command, "--out", str(out)], env={**own, **more}, stdout=file, stderr=file))
    while None in (statuses := [process.poll() for process in processes]) and not any(statuses):  # one that fails leaves the others waiting
        time.sleep(0.1)
    for process, log in zip(processes, logs, strict=True):
        if process.poll():
            for other in processes:
                other.kill()
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}: {log.read_text()[-2000:]}")
    with np.load(out / "final.npz") as archive:
        return dict(archive)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def apart(x: np.ndarray, y: np.ndarray) -> tuple[str, str]:
    """The two distances of x from y."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return f"{np.linalg.norm(x - y) / max(np.linalg.norm(y), np.finfo(float).tiny):.1e}", f"{np.abs(x - y).max(initial=0):.1e}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], usage="processes.py [--processes N] [--mesh MESH] -- COMMAND ...")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mesh", default="data=2,fsdp=2")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    total = int(np.prod([int(part.partition("=")[2]) for part in options.mesh.split(",")]))
    if options.processes < 2 or total % options.processes:
        parser.error("give two processes or more, a mesh of a multiple of them, and after -- the command")
    command, spread = options.command, [*options.command, "--mesh", options.mesh]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(options.processes)}
    each = {"XLA_FLAGS": f"{DEVICES}={total // options.processes}", **shared}
    with tempfile.TemporaryDirectory(prefix="processes") as folder:
        work = Path(folder)
        one = ended(command, work / "one", [{}])
        others = {
            f"{options.mesh}, one process": ended(spread, work / "mesh", [{"XLA_FLAGS": f"{DEVICES}={total}"}]),
            f"{options.mesh}, {options.processes} processes": ended(
                spread, work / "processes", [{**each, "JAX_PROCESS_ID": str(i)} for i in range(options.processes)]
            ),
            "one device, compiled without AVX": ended(command, work / "older", [{"XLA_FLAGS": OLDER}]),
        }
    rows = [(name, key, *apart(found[key], one[key])) for name, found in others.items() for key in one if one[key].dtype.kind == "f"]
    print(" ".join(command))
    print(table(("run", "array", "of its norm", "largest"), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
