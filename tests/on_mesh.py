"""A run that steers noise, injected noises and embeddings and then fits weights, on any mesh, in any number of processes.

    python on_mesh.py OUT MESH [RUN NAME]

With RUN the process dies as soon as the folder OUT/RUN/state holds a name that starts with NAME.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adjoint_jax as aj
from adjoint_jax.experiments import Run, iterate, mesh, npz
from adjoint_jax.guide import Given, Sampler, Steering, steer

BATCH, ITERATIONS = 8, 2
PROCESS = aj.VPCosine()
GRID = aj.grids.log_snr(PROCESS, 3)


def network(x, t, args):
    """A smooth eps that depends on everything, two dense layers at each pixel."""
    p = args["params"]
    hidden = jnp.tanh(x @ p["in"] + args["cond"][:, None, None, :] @ p["cond"] + p["bias"] * t)
    return hidden @ p["out"]


def inputs(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    params = {"in": draw(2, 8), "cond": draw(3, 8), "bias": draw(8), "out": draw(8, 2) / 3, "odd": draw(3)}
    variables = {"x_T": draw(BATCH, 4, 4, 2), "noise": draw(3, BATCH, 4, 4, 2), "embedding": draw(BATCH, 3)}
    return params, variables


def score(weight, images):
    return jnp.mean(jnp.sin(images) * weight, axis=(1, 2, 3))


def laid_out(devices, dtype=jnp.float64):
    """The problem of `guide`, its arrays and the noises, on the devices."""
    params, variables = inputs(dtype)
    sampler = Sampler(network, PROCESS, "eps", GRID, aj.SDEDPMSolverPP(2))
    steering = Steering(sampler, aj.DiscreteAdjoint(), optax.adam(0.05), ("x_T", "noise", "embedding"))
    rest = Given(None, jnp.ones((), dtype), None, jax.tree_util.Partial(score, jnp.arange(2, dtype=dtype)))
    given = mesh.everywhere(rest, devices)._replace(params=mesh.weights(params, devices))
    return steering, given, {name: mesh.batched(value, devices, int(name == "noise")) for name, value in variables.items()}


def objective(params, shift, variables):
    """Of the weights: minus the scores, and the images; `odd` has no part in it."""
    term = aj.DiffusionTerm(network, PROCESS)
    args = {"params": params, "cond": variables["embedding"] + shift}
    images = aj.sample(term, variables["x_T"], args, grid=GRID, solver=diffrax.Heun())
    scores = score(jnp.arange(2, dtype=images.dtype), images)
    return -jnp.sum(scores), (images, scores)


AXES = (None, {"x_T": 0, "embedding": 0})


def fit(devices, dtype=jnp.float64):
    """Two steps on the weights: the run's progress."""
    params, variables = inputs(dtype)
    batch = mesh.batched({name: variables[name] for name in AXES[1]}, devices)
    optimiser = optax.adam(0.05)
    value = mesh.gradient(objective, devices, AXES)

    def update(given, state):
        params, moments = state
        (total, (_, scores)), found = value(params, *given)
        updates, moments = optimiser.update(found, moments, params)
        return (optax.apply_updates(params, updates), moments), (total, scores)

    laid = mesh.weights(params, devices)
    start = mesh.together((laid, optimiser.init(laid)))
    step = mesh.staying(jax.jit(update), start)
    given = (mesh.everywhere(jnp.full(3, 0.1, dtype), devices), batch)

    def row(state, k):
        state, (total, scores) = step(given, state)
        return state, {"iteration": k, "metric": float(total), "per_image": np.asarray(scores).tolist()}

    return start, row


def main(out, text, checkpointer=None):
    """Fits, then steers; `final.npz` holds what both came to."""
    devices = mesh.make(text, BATCH)
    start, row = fit(devices)
    run = Run(out / "fitted", {"seed": 0}, True, checkpointer)
    restored = run.restore(start)
    fitted = run.follow(iterate(row, restored, 2), restored, 2)
    run.write({"final.npz": npz(fitted.state[0])})
    steering, given, variables = laid_out(devices)
    run = Run(out / "steered", {"seed": 0}, True, checkpointer)
    restored = run.restore(steering.start(variables).state)
    steered = run.follow(steer(steering, given, restored, ITERATIONS), restored, ITERATIONS + 1, 2)
    run.write({"final.npz": npz({**steered.state.variables, "images": steered.state.images})})


def die_when_there_is(folder, words):
    """Kills this process as soon as a name that starts with `words` is in `folder`."""

    def watch():
        while not (folder.is_dir() and any(file.name.startswith(words) for file in folder.iterdir())):
            time.sleep(1e-4)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    mesh.begin(False)
    if len(sys.argv) > 3:
        die_when_there_is(Path(sys.argv[1]) / sys.argv[3] / "state", sys.argv[4])
    main(Path(sys.argv[1]), sys.argv[2], "orbax")
