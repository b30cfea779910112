"""Gradients by diffrax's own adjoints and by torchdiffeq, each against the exact gradient of the solve that it ran."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from problems import Problem

import adjoint_jax as aj


class Peer(NamedTuple):
    """For which networks, and what measures it: (problem, steps, errors) -> entry."""

    networks: tuple[str, ...]
    measure: Callable

    def __call__(self, *args: Any) -> dict[str, Any]:
        return self.measure(*args)


def _checkpointed(problem: Problem, steps: int, errors: Callable) -> dict[str, Any]:
    """diffrax's RecursiveCheckpointAdjoint through our DPM-Solver++(2M): autodiff of the sampler, so its answer is the exact one."""
    grid = jnp.asarray(problem.even(steps), problem.x_T.dtype)
    target = jax.random.normal(jax.random.key(5), problem.x_T.shape)

    def loss(x: Any, adjoint: Any) -> Any:
        solution = diffrax.diffeqsolve(
            problem.term,
            aj.DPMSolverPP(2),
            grid[0],
            grid[-1],
            None,
            x,
            args=problem.args,
            stepsize_controller=diffrax.StepTo(grid),
            adjoint=adjoint,
            max_steps=steps + 1,
        )
        return 0.5 * jnp.sum((_last(solution) - target) ** 2)

    return _compared(lambda adjoint: jax.grad(lambda x: loss(x, adjoint)), diffrax.RecursiveCheckpointAdjoint(), problem.x_T, errors)


def _backsolved(problem: Problem, steps: int, errors: Callable) -> dict[str, Any]:
    """diffrax's BacksolveAdjoint through Heun's method on dx/du, u the fraction of a grid uniform in log(alpha/sigma): states re-integrated."""
    times = problem.even(steps)
    target = jax.random.normal(jax.random.key(5), problem.x_T.shape)

    def field(u: Any, x: Any, args: Any) -> Any:
        place = jnp.clip(u * steps, 0, steps)
        k = jnp.clip(place.astype(int), 0, steps - 1)
        ts = jnp.asarray(times, x.dtype)
        slope = (ts[k + 1] - ts[k]) * steps
        return slope * problem.term.vf(ts[k] + (place - k) * (ts[k + 1] - ts[k]), x, args)

    def loss(x: Any, adjoint: Any) -> Any:
        term = diffrax.ODETerm(field)
        solution = diffrax.diffeqsolve(term, diffrax.Heun(), 0.0, 1.0, 1.0 / steps, x, args=problem.args, adjoint=adjoint, max_steps=steps + 2)
        return 0.5 * jnp.sum((_last(solution) - target) ** 2)

    return _compared(lambda adjoint: jax.grad(lambda x: loss(x, adjoint)), diffrax.BacksolveAdjoint(), problem.x_T, errors) | {
        "F B": (4 * steps, 2 * steps)
    }


def _last(solution: Any) -> Any:
    return solution.ys[-1]


def bytes_of(program: Any) -> int:
    """Temporaries of a compiled program."""
    return program.memory_analysis().temp_size_in_bytes


def _compared(gradient: Callable, adjoint: Any, x: Any, errors: Callable) -> dict[str, Any]:
    program = jax.jit(gradient(adjoint)).lower(x).compile()
    found = program(x)
    begin = time.perf_counter()
    jax.block_until_ready(program(x))
    seconds = time.perf_counter() - begin
    exact = jax.jit(gradient(diffrax.DirectAdjoint()))(x)
    return {"x_T": errors(found, exact), "seconds": seconds, "bytes": bytes_of(program)}


def _torchdiffeq(problem: Problem, steps: int, errors: Callable) -> dict[str, Any]:
    """torchdiffeq's odeint_adjoint by fixed steps of its midpoint method, on the mixture written in torch."""
    import torch  # pyright: ignore[reportMissingImports]
    from torchdiffeq import odeint, odeint_adjoint  # pyright: ignore[reportMissingImports]

    grid, process = problem.even(steps), problem.term.process
    mixture = problem.extra
    means, widths = torch.tensor(mixture.means, dtype=torch.float32), torch.tensor(mixture.widths, dtype=torch.float32)
    shift = torch.tensor(np.asarray(problem.args["cond"]))
    rho = np.asarray(process.sigma(grid) / process.alpha(grid))
    target = torch.tensor(np.array(jax.random.normal(jax.random.key(5), problem.x_T.shape)))

    class Field(torch.nn.Module):
        """dy/d(log rho) = rho eps(y, rho) of y = x / alpha."""

        def forward(self, s: Any, y: Any) -> Any:
            level = torch.exp(s)
            variance = widths**2 + level**2
            away = (y + 0.0)[:, None] - means[None] - shift[:, None]
            logits = -0.5 * torch.sum(away**2, -1) / variance - 0.5 * y.shape[1] * torch.log(variance)
            weights = torch.softmax(logits, -1)
            return level**2 * torch.sum(weights[..., None] * away / variance[:, None], 1)

    def gradient(solve: Any) -> tuple[np.ndarray, float]:
        x = torch.tensor(np.array(problem.x_T), requires_grad=True)
        begin = time.perf_counter()
        out = solve(Field(), x / float(process.alpha(grid[0])), torch.tensor(np.log(rho), dtype=torch.float32), method="midpoint")[-1]
        value = 0.5 * torch.sum((out * float(process.alpha(grid[-1])) - target) ** 2)
        return torch.autograd.grad(value, x)[0].numpy(), time.perf_counter() - begin

    found, seconds = gradient(odeint_adjoint)
    return {"x_T": errors(found, gradient(odeint)[0]), "seconds": seconds, "F B": (4 * steps, 2 * steps)}


EVERY = ("mixture", "digits", "flow")
PEERS = {
    "diffrax RecursiveCheckpointAdjoint": Peer((*EVERY, "unet64"), _checkpointed),
    "diffrax BacksolveAdjoint (Heun)": Peer(EVERY, _backsolved),
}
if find_spec("torchdiffeq"):
    PEERS["torchdiffeq odeint_adjoint (midpoint)"] = Peer(("mixture",), _torchdiffeq)
