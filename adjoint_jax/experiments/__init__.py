"""What the experiments have in common: a run that can be killed, its report and pictures, options from a file, constraints, metrics, statistics.

An experiment is a frozen dataclass of options, a state, a step, and what is written at the end:

    def main(options: Options) -> None:
        run = Run(Path(options.out), recorded(options), options.resume)
        restored = run.restore(start)
        progress = run.follow(iterate(step, restored, options.iterations), restored, options.iterations, options.save_every)
        run.write({"final.npz": npz(progress.state), "report.md": document(...)})

    if __name__ == "__main__":
        command(main, Options)
"""

from .options import Experiment as Experiment, OnMesh as OnMesh, command as command, recorded as recorded
from .run import Progress as Progress, Run as Run, iterate as iterate, npz as npz
