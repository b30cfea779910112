"""The samplers of diffusers as they are, on the problems of `problems`, from the first to the last level of the training table.

Those that always go on to sigma = 0 are stopped before that step.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from problems import Problem

MULTISTEP = {
    "DPM-Solver++(2M)": ("DPMSolverMultistep", {"solver_order": 2}),
    "DPM-Solver++(2M) Karras": ("DPMSolverMultistep", {"solver_order": 2, "use_karras_sigmas": True}),
    "DPM-Solver++(2M) lu": ("DPMSolverMultistep", {"solver_order": 2, "use_lu_lambdas": True}),
    "DPM-Solver++(3M)": ("DPMSolverMultistep", {"solver_order": 3}),
    "DPM-Solver(2M)": ("DPMSolverMultistep", {"solver_order": 2, "algorithm_type": "dpmsolver"}),
    "DPM-Solver++(2S)": ("DPMSolverSinglestep", {"solver_order": 2}),
    "DPM-Solver++(3S)": ("DPMSolverSinglestep", {"solver_order": 3}),
    "UniPC-2": ("UniPCMultistep", {"solver_order": 2}),
    "UniPC-3": ("UniPCMultistep", {"solver_order": 3}),
    "UniPC-3 Karras": ("UniPCMultistep", {"solver_order": 3, "use_karras_sigmas": True}),
    "DEIS-2": ("DEISMultistep", {"solver_order": 2}),
    "DEIS-3": ("DEISMultistep", {"solver_order": 3}),
    "SA-Solver, tau = 0": ("SASolver", {"predictor_order": 3, "corrector_order": 4, "tau_func": lambda t: 0.0}),
}
EXPLODING = {"Euler": ("EulerDiscrete", 1), "Heun": ("HeunDiscrete", 2), "DPM-Solver-2 (KDPM2)": ("KDPM2Discrete", 2), "LMS": ("LMSDiscrete", 1)}
FLOWS = {"flow Euler": ("FlowMatchEulerDiscrete", 1), "flow Heun": ("FlowMatchHeunDiscrete", 2)}
FLOW_MULTISTEP = ("DPM-Solver++(2M)", "DPM-Solver++(3M)", "UniPC-2", "UniPC-3")


def peers(problem: Problem, evaluations: int) -> dict[str, Callable[[], np.ndarray]]:
    """The samplers that can spend a number of network evaluations."""
    predict = jax.jit(lambda x, t: problem.term.network(x, t, problem.args))
    if problem.betas is None:
        rows = {name: lambda name=name: _flow_multistep(problem, predict, name, evaluations) for name in FLOW_MULTISTEP}
        return rows | {name: lambda entry=e: _flow(problem, predict, entry, evaluations) for name, e in FLOWS.items() if evaluations % e[1] == 0}
    rows = {name: lambda name=name: _multistep(problem, predict, name, evaluations) for name in MULTISTEP}
    return rows | {name: lambda entry=e: _exploding(problem, predict, entry, evaluations) for name, e in EXPLODING.items() if evaluations % e[1] == 0}


def _made(problem: Problem, name: str, **more: Any) -> Any:
    import diffusers  # pyright: ignore[reportMissingImports]

    kind = {"eps": "epsilon", "v": "v_prediction"}[problem.term.prediction]
    table = {"trained_betas": problem.betas, "num_train_timesteps": len(problem.betas), "prediction_type": kind}
    table |= {} if name == "DPMSolverSinglestep" else {"timestep_spacing": "linspace"}  # which it is anyway
    return getattr(diffusers, f"{name}Scheduler")(**table, **more)


def _multistep(problem: Problem, predict: Any, name: str, evaluations: int) -> np.ndarray:
    kind, config = MULTISTEP[name]
    if kind in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"):
        config = {**config, "final_sigmas_type": "sigma_min"}
    scheduler = _made(problem, kind, **config)
    scheduler.set_timesteps(evaluations)
    return _run(scheduler, problem.x_T, predict, evaluations)


def _exploding(problem: Problem, predict: Any, entry: tuple[str, int], evaluations: int) -> np.ndarray:
    """In the coordinates x / alpha."""
    scheduler = _made(problem, entry[0])
    scheduler.set_timesteps(evaluations // entry[1] + 1)
    process = problem.term.process
    x = _run(scheduler, np.asarray(problem.x_T) / process.alpha(problem.start), predict, evaluations)
    return x * process.alpha(problem.end)


def _flow(problem: Problem, predict: Any, entry: tuple[str, int], evaluations: int) -> np.ndarray:
    import diffusers  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    scheduler = getattr(diffusers, f"{entry[0]}Scheduler")()
    steps = evaluations // entry[1]
    scheduler.set_timesteps(steps + 1)
    sigmas = torch.linspace(problem.start, problem.end, steps + 1)
    _lay(scheduler, sigmas if entry[1] == 1 else torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)]))
    return _run(scheduler, problem.x_T, _velocity(predict), evaluations, 1000)


def _flow_multistep(problem: Problem, predict: Any, name: str, evaluations: int) -> np.ndarray:
    """From 0.999, for their log(alpha/sigma) has to be finite."""
    import diffusers  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    kind, config = MULTISTEP[name]
    scheduler = getattr(diffusers, f"{kind}Scheduler")(prediction_type="flow_prediction", use_flow_sigmas=True, **config)
    scheduler.set_timesteps(evaluations)
    _lay(scheduler, torch.linspace(0.999, problem.end, evaluations + 1))
    return _run(scheduler, problem.x_T, _velocity(predict), evaluations, 1000)


def _lay(scheduler: Any, sigmas: Any) -> None:
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas[:-1] * 1000


def _velocity(predict: Any) -> Any:
    return lambda x, t: (x - predict(x, t)) / t


def _run(scheduler: Any, x: Any, predict: Any, evaluations: int, unit: float = 1.0) -> np.ndarray:
    """`evaluations` calls of the network; timesteps are told as they are."""
    import torch  # pyright: ignore[reportMissingImports]

    x = torch.tensor(np.asarray(x, np.float32))
    for k in range(evaluations):
        t = scheduler.timesteps[k]
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = torch.tensor(np.asarray(predict(seen.numpy(), np.float32(t) / np.float32(unit))))
        x = scheduler.step(out, t, x).prev_sample
    return x.numpy()
