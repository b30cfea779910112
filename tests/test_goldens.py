"""Published samplers' own outputs: every golden case is reproduced with its gradients, or stands in `PENDING` with its reason."""

import fnmatch
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.cases import NET, Case, cases, complete, subset
from goldens.networks import arguments
from goldens.peers import Missing, Run, run_of

import adjoint_jax as aj
from adjoint_jax.sample import prepare

PENDING = {
    "diffusers/ipndm_*": "x itself enters the history as eps where alpha = 0, on a schedule of its own: not a method",
}
SPEED = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}


def understood(options: dict[str, Any]) -> dict[str, Any]:
    """The compiler options that this jaxlib has: together they compile three times faster, and programs this small run as fast."""
    kept = {}
    for name, value in options.items():
        try:
            jax.jit(lambda x: x + 1, compiler_options={name: value})(1.0)
        except jax.errors.JaxRuntimeError:  # it has no such option
            continue
        kept[name] = value
    return kept


OPTIONS = understood(SPEED)


def pending(name: str) -> str | None:
    """The reason for which a case is not reproduced, or None."""
    return next((reason for pattern, reason in PENDING.items() if fnmatch.fnmatch(name, pattern)), None)


def relative(found: Any, published: np.ndarray) -> float:
    """The distance in the maximum norm over that of the published."""
    return float(np.abs(np.asarray(found) - published).max() / np.abs(published).max())


@functools.partial(eqx.filter_jit, compiler_options=OPTIONS)
def pull(computation: Any, target: Any) -> tuple[Any, Any]:
    """x_0 and the gradient of |x_0 - target|^2 / 2 in (x_T, args["params"]): cases of one shape share one compiled program."""

    def run(x: Any, params: Any) -> Any:
        given = eqx.tree_at(lambda c: c.x, computation, x)
        given = eqx.tree_at(lambda c: c.args["params"], given, params) if params else given
        value = aj.DiscreteAdjoint().run(given)[0]
        return value.x if computation.paired else value

    x_0, transpose = jax.vjp(run, computation.x, computation.args.get("params"))
    return x_0, transpose(x_0 - target)


def through_the_steps(search: Any, x: Any, args: Any, target: Any, found: Any) -> tuple[Any, Any]:
    """The same for an adaptive sampler, its step sizes differentiated as well."""

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def run(x: Any, args: Any) -> tuple[Any, Any]:
        x_0, transpose = jax.vjp(lambda x, args: search(x_T=x, args=args, like=found).x, x, args)
        return x_0, transpose(x_0 - target)

    x_0, (in_x, in_args) = run(x, args)
    return x_0, (in_x, in_args.get("params"))


def distances(case: Case, run: Run) -> dict[str, float]:
    """How far x_0 and the gradients are from the published ones."""
    x, target, args = jnp.asarray(case.array("xT")) * run.scale, jnp.asarray(case.array("target")), arguments(case.model)
    term = aj.DiffusionTerm(run.network, run.process, run.prediction)
    if run.encodes:
        encode = lambda x: aj.solvers.encode_noise(term, x, args, grid=run.grid, solver=run.solver, noise=run.noise)[1][-2]  # noqa: E731
        last, transpose = jax.vjp(encode, x)
        return {"x0": relative(last, case.array("x0")), "grad_xT": relative(transpose(last - target)[0], case.array("grad_xT"))}
    if run.adaptive:
        ends = {"t_start": run.grid[0], "t_end": run.grid[-1]}
        search = functools.partial(aj.solvers.adaptive_grid, term, solver=run.solver, published=True, **ends, **run.adaptive)
        found = search(x_T=x, args=args)
        assert found.evaluations == len(case.array("lam_eval"))
        run = run._replace(grid=found.ts)
    if run.through:
        x_0, (in_x, in_params) = through_the_steps(search, x, args, target, found)
    else:
        x_0, (in_x, in_params) = pull(prepare(term, x, args, run.grid, run.solver, None, run.noise, False, reverse=run.reverse), target)
    found = {"x0": relative(x_0, case.array("x0")), "grad_xT": relative(in_x * run.scale, case.array("grad_xT"))}
    if in_params is not None and case.has("grad_theta"):
        found["grad_theta"] = relative(jnp.concatenate([in_params[name].ravel() for name in NET]), case.array("grad_theta"))
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in subset() else pytest.mark.slow) for name in cases()])
def test_published(name):
    """x_0 to 1e-10 and its gradients to 1e-8 in the maximum norm, or the tolerance that the goldens' README gives.

    One case a method; `pytest -m slow tests/test_goldens.py` runs the others.
    """
    case, reason = cases()[name], pending(name)
    run = run_of(case)
    if isinstance(run.solver, Missing):
        assert reason, f"{name} needs {run.solver.what}: map it, or give its reason in PENDING"
        pytest.skip(f"pending: {reason}")
    assert reason is None, f"{name} has a solver: remove {reason!r} from PENDING"
    found = distances(case, run)
    first, gradient = run.tolerance
    assert found.pop("x0") < first
    assert all(value < gradient for value in found.values()), found


def test_pending_counts():
    """The table holds no pattern that no case needs, and the count of reproduced cases is the one written here."""
    if not complete():
        pytest.skip("the committed subset alone is here")
    names = list(cases())
    assert len(names) == 318
    idle = [pattern for pattern in PENDING if not fnmatch.filter(names, pattern)]
    assert not idle
    assert sum(pending(name) is None for name in names) == REPRODUCED


REPRODUCED = 317
