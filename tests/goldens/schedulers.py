"""The schedulers of diffusers, each from its configuration alone: `aj.from_scheduler_config`."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import adjoint_jax as aj

from .cases import Case
from .runs import Missing, Run, network, table


class Trained(eqx.Module):
    """A golden model as the network that a scheduler calls: of a training step, or, for a flow, of so many times its time."""

    network: Any
    unit: float = eqx.field(static=True, default=1.0)

    def __call__(self, x: Any, t: Any, args: Any) -> Any:
        return self.network(x, t / self.unit, args)


class Raw(eqx.Module):
    """A golden model that predicts eps in EDM's process as EDM's raw network F, told log(sigma)/4: the inverse of `edm_precondition`."""

    network: Any
    sigma_data: float = eqx.field(static=True)

    def __call__(self, x: Any, t: Any, args: Any) -> Any:
        c, sigma = self.sigma_data, jnp.exp(4 * t)
        scale = jnp.sqrt(sigma**2 + c**2)
        x = x * scale
        x0 = x - sigma * self.network(x, sigma, args)
        return (x0 - (c / scale) ** 2 * x) / (sigma * c / scale)


def diffusers(case: Case) -> Run:
    meta, config = case.meta, {"_class_name": case.meta["scheduler"], **case.meta["cfg"]}
    if meta["scheduler"] == "IPNDMScheduler":
        return Run(network(case, aj.EDM()), aj.EDM(), "eps", case.array("timesteps"), Missing("IPNDM of diffusers"))
    if "tau_func" in config:
        config["tau_func"] = float(config["tau_func"].split()[1])
    scheduler = aj.from_scheduler_config(config, eta=meta.get("eta", 0.0), mu=meta.get("set_kw", {}).get("mu"))
    process, steps = scheduler.process, meta["steps"]
    grid, solver = scheduler.grid(steps), scheduler.solver(steps)
    if isinstance(process, aj.EDM):
        trained = Raw(network(case, process), scheduler.options["sigma_data"])
    else:
        flow = isinstance(process, aj.FlowMatching)
        kind = "flow" if flow else {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[meta.get("pred", "epsilon")]
        # The goldens' model knows one table of each name, whatever betas are the scheduler's default (Heun, DPM-Solver-2).
        known = process if flow else table({"squaredcos_cap_v2": "cosine"}.get(schedule := config.get("beta_schedule", "linear"), schedule))
        trained = Trained(network(case, known, kind), 1000.0 if flow else 1.0)
    told = trained if meta.get("mode") == "sigma" else scheduler.network(trained, steps)
    noise = case.array("noise")[: len(grid) - 1] if solver.draws else None
    scale = float(process.alpha(grid[0])) if meta["space"] == "ve" else 1.0
    return Run(told, process, scheduler.prediction, np.asarray(grid), solver, noise, scale)
