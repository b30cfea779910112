"""The loop that steers: its update is the gradient, it is traced once, it can stop and go on anywhere, and it counts its work truly."""

import dataclasses
from collections import Counter
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adjoint_jax as aj
from adjoint_jax.experiments.engines import GREEDY, evaluations
from adjoint_jax.experiments.metrics import closeness, log_probability
from adjoint_jax.guide import Given, Sampler, Steering, audit, steer

PROCESS = aj.VPCosine()
GRID = aj.grids.log_snr(PROCESS, 4)


def network(x: Any, t: Any, args: Any) -> Any:
    """A smooth eps that depends on everything."""
    shift = args["cond"] if "cond" in args else jnp.zeros(x.shape[-1:], x.dtype)
    shift = jnp.broadcast_to(shift, (len(x), x.shape[-1]))
    return jnp.tanh(x * args["params"] + shift[:, None, None, :]) * (0.5 + 0.5 * t)


def metric(images: Any) -> Any:
    return jnp.mean(jnp.sin(images), axis=(1, 2, 3))


def problem(
    guided: bool = False, adjoint: Any = None, driven: tuple = ("x_T", "embedding"), project: str = "shell", batch: int = 3, score: Any = metric
):
    rng = np.random.default_rng(0)
    sampler = Sampler(network, PROCESS, "eps", GRID, aj.DPMSolverPP(2), guided)
    variables = {"x_T": jnp.asarray(rng.normal(size=(3, 4, 4, 2)))[:batch], "embedding": jnp.asarray(rng.normal(size=(3, 2)))[:batch]}
    given = Given(jnp.asarray(0.7), jnp.asarray(1.5), jnp.asarray(rng.normal(size=2)), jax.tree_util.Partial(score))
    return Steering(sampler, adjoint or aj.DiscreteAdjoint(), optax.sgd(0.1), driven, project), given, variables


def run(steering, given, variables, iterations=3):
    return list(steer(steering, given, steering.start(variables), iterations))


@pytest.mark.parametrize("guided", [False, True])
def test_the_update_is_a_step_along_the_gradient(guided):
    steering, given, variables = problem(guided, project="none")

    def total(variables):
        args = {"params": given.params, "cond": variables["embedding"], "uncond": given.null}
        term = aj.DiffusionTerm(aj.cfg(network, given.scale) if guided else network, PROCESS, "eps")
        args = args if guided else {name: args[name] for name in ("params", "cond")}
        return jnp.sum(metric(aj.sample(term, variables["x_T"], args, grid=GRID, adjoint=aj.DirectAdjoint())))

    gradient = jax.grad(total)(variables)
    following, seen = steering.update(given, steering.start(variables).state)
    for name in variables:
        np.testing.assert_allclose(following.variables[name], variables[name] + 0.1 * gradient[name], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(seen.norms[name], np.linalg.norm(gradient[name]), rtol=1e-10)
    np.testing.assert_allclose(jnp.sum(seen.scores), total(variables), rtol=1e-12)


def test_the_update_is_traced_once_for_all_values():
    traces = Counter()

    def counting(images):
        traces["metric"] += 1
        return metric(images)

    steering, given, variables = problem(guided=True, score=counting)
    update = jax.jit(steering.update)
    state = steering.start(variables).state
    for scale in (1.0, 2.0):
        moved = given._replace(scale=jnp.asarray(scale), params=given.params * scale, null=given.null * scale)
        state, _ = update(moved, state)
    assert traces["metric"] == 1
    run(steering, given, variables, iterations=5)
    assert traces["metric"] == 1


def test_images_of_a_batch_do_not_interact():
    together = run(*problem())[-1]
    alone = run(*problem(batch=1))[-1]
    np.testing.assert_allclose(together.state.variables["x_T"][:1], alone.state.variables["x_T"], rtol=1e-12)
    np.testing.assert_allclose(together.state.images[:1], alone.state.images, rtol=1e-12)


@pytest.mark.parametrize("driven", [("x_T",), ("embedding",), ("x_T", "embedding")])
def test_only_what_is_driven_moves_and_noise_stays_on_its_shell(driven):
    steering, given, variables = problem(driven=driven)
    end = run(steering, given, variables)[-1]
    for name in variables:
        assert bool(jnp.any(end.state.variables[name] != variables[name])) == (name in driven)
    if "x_T" in driven:
        radius = float(PROCESS.sigma(GRID[0])) * 32**0.5
        np.testing.assert_allclose(np.linalg.norm(end.state.variables["x_T"].reshape(3, -1), axis=1), radius, rtol=1e-12)
    assert set(end.history[0]["gradient_norm"]) == set(driven)


RANDOM = {"sde-dpmpp": aj.SDEDPMSolverPP(2), "ddim": aj.DDIM(eta=1.0)}


def random_problem(solver: str = "sde-dpmpp", driven: tuple = ("x_T", "noise"), adjoint: Any = None, rate: float = 0.1, **constraint: Any):
    _, given, variables = problem()
    sampler = Sampler(network, PROCESS, "eps", GRID, RANDOM[solver])
    variables["noise"] = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 4, 4, 2)))
    return Steering(sampler, adjoint or aj.DiscreteAdjoint(), optax.sgd(rate), driven, **constraint), given, variables


@pytest.mark.parametrize("solver", RANDOM)
def test_injected_noise_steps_along_its_gradient(solver):
    steering, given, variables = random_problem(solver, project="none")

    def total(noise):
        args = {"params": given.params, "cond": variables["embedding"]}
        term = aj.DiffusionTerm(network, PROCESS, "eps")
        x = aj.sample(term, variables["x_T"], args, grid=GRID, solver=RANDOM[solver], adjoint=aj.DirectAdjoint(), noise=noise)
        return jnp.sum(metric(x))

    gradient = jax.grad(total)(variables["noise"])
    following, seen = steering.update(given, steering.start(variables).state)
    assert jnp.linalg.norm(gradient[0]) > 0
    np.testing.assert_allclose(following.variables["noise"], variables["noise"] + 0.1 * gradient, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(jnp.sum(seen.scores), total(variables["noise"]), rtol=1e-12)


def norms(x: Any, order: Any = 2) -> Any:
    """Of each image, at each step."""
    return np.linalg.norm(np.asarray(x).reshape(-1, 32), ord=order, axis=1)


SPREADS = {"x_T": float(PROCESS.sigma(GRID[0])), "noise": 1.0}


@pytest.mark.parametrize(("project", "order"), [("linf", np.inf), ("l2", 2)])
def test_balls_about_the_start_hold_at_the_end_of_a_run(project, order):
    steering, given, variables = random_problem(project=project, radius=0.005, rate=20.0)
    end = run(steering, given, variables, iterations=4)[-1]
    for name, spread in SPREADS.items():
        moved = norms(end.state.variables[name] - variables[name], order)
        assert np.max(moved) == pytest.approx(0.005 * spread, rel=1e-9)
        assert np.max(moved) <= 0.005 * spread * (1 + 1e-12)
    assert end.history[-1]["metric"] > end.history[0]["metric"]


def test_the_shell_is_that_of_each_step():
    steering, given, variables = random_problem(project="shell")
    end = run(steering, given, variables)[-1]
    for name, spread in SPREADS.items():
        np.testing.assert_allclose(norms(end.state.variables[name]), spread * 32**0.5, rtol=1e-12)


def test_the_penalty_draws_the_norms_to_their_mode():
    steering, given, variables = random_problem(project="none", penalty=1e4, rate=1e-3)
    variables = {name: (2 if name in SPREADS else 1) * value for name, value in variables.items()}
    end = run(steering, given, variables, iterations=20)[-1]
    for name, spread in SPREADS.items():
        np.testing.assert_allclose(norms(end.state.variables[name]), spread * 31**0.5, rtol=0.02)


def test_last_k_leaves_the_first_noise_alone_and_moves_what_is_read_late():
    steering, given, variables = random_problem(driven=("x_T", "noise", "embedding"), adjoint=aj.LastK(2), project="none")
    end = run(steering, given, variables)[-1].state.variables
    np.testing.assert_array_equal(end["x_T"], variables["x_T"])
    np.testing.assert_array_equal(end["noise"][:2], variables["noise"][:2])
    assert jnp.any(end["noise"][2] != variables["noise"][2])
    assert jnp.all(jnp.any(end["embedding"] != variables["embedding"], axis=1))


@pytest.mark.parametrize("guided", [False, True])
def test_greedy_is_the_gradient_of_the_metric_of_the_posterior_mean(guided):
    steering, given, variables = problem(guided, adjoint=GREEDY, driven=("x_T",), project="none")
    args = {"params": given.params, "cond": variables["embedding"], **({"uncond": given.null} if guided else {})}
    term = aj.DiffusionTerm(aj.cfg(network, given.scale) if guided else network, PROCESS, "eps")
    loss = lambda images: -jnp.sum(metric(images))  # noqa: E731
    gradient = aj.adjoints.posterior_gradient(loss, term, variables["x_T"], GRID[0], args)
    following, seen = steering.update(given, steering.start(variables).state)
    np.testing.assert_allclose(following.variables["x_T"], variables["x_T"] - 0.1 * gradient, rtol=1e-12)
    np.testing.assert_allclose(seen.norms["x_T"], jnp.linalg.norm(gradient), rtol=1e-12)
    np.testing.assert_allclose(seen.scores, metric(steering.sampler(given, variables)), rtol=1e-12)


def test_history_has_a_row_an_iterate_and_the_metric_rises():
    steps = run(*problem(project="none"))
    assert [len(step.history) for step in steps] == [1, 2, 3, 4]
    metrics = [row["metric"] for row in steps[-1].history]
    assert metrics == sorted(metrics)
    assert metrics[0] < metrics[-1]
    np.testing.assert_allclose(np.mean(metric(steps[-1].state.images)), metrics[-1], rtol=1e-12)
    np.testing.assert_array_equal(steps[-1].state.before, steps[0].state.images)
    np.testing.assert_array_equal(steps[-1].state.variables["x_T"], steps[-2].state.variables["x_T"])


def test_going_on_after_any_iterate_changes_nothing():
    steering, given, variables = problem()
    unbroken = run(steering, given, variables)
    for stop in unbroken:
        end = [stop, *steer(steering, given, stop, 3)][-1]
        np.testing.assert_array_equal(end.state.variables["x_T"], unbroken[-1].state.variables["x_T"])
        assert [row["per_image"] for row in end.history] == [row["per_image"] for row in unbroken[-1].history]


@pytest.mark.parametrize(
    ("spoil", "score", "sentence"),
    [
        (jnp.nan, metric, r"Iteration 0: The state is not finite after step 0 of 4 \(t = 0.9946\)"),
        (1.0, lambda images: jnp.log(0 * metric(images)), r"Iteration 0: The metric is not finite at the images \[0, 1, 2\]"),
        (1.0, lambda images: jnp.sqrt(0 * metric(images)), "Iteration 0: The gradient is not finite, though"),
    ],
    ids=["network", "metric", "gradient"],
)
def test_what_is_not_finite_is_named(spoil, score, sentence):
    steering, given, variables = problem(score=score)
    with pytest.raises(FloatingPointError, match=sentence):
        run(steering, given._replace(params=given.params * spoil), variables)


def test_the_audit_compares_with_the_exact_gradient():
    steering, given, variables = problem()
    adjoints = {"exact": aj.DiscreteAdjoint(), "direct": aj.DirectAdjoint(), "deis": aj.AdjointDEIS()}
    rows = audit(steering.sampler, given, {"first": variables, "last": variables}, adjoints)
    assert [point for point, _ in rows] == ["first"] * 6 + ["last"] * 6
    assert {(row.adjoint, row.wrt) for _, row in rows} == {(name, leaf) for name in adjoints for leaf in variables}
    for _, row in rows:
        assert row.relative_error == 0 if row.adjoint == "exact" else row.relative_error < (1e-12 if row.adjoint == "direct" else 1)


CALLS: Counter = Counter()


def count(direction: str, x: Any) -> None:
    """Counts a call when it runs. It is handed x, since JAX moves what depends on nothing out of a loop."""
    jax.debug.callback(lambda _: CALLS.update({direction: 1}), x)


@jax.custom_vjp
def counted(x):
    count("forward", x)
    return jnp.tanh(x)


def counted_forward(x):
    count("forward", x)
    return jnp.tanh(x), x


def counted_backward(x, cotangent):
    count("backward", x)
    return ((1 - jnp.tanh(x) ** 2) * cotangent,)


counted.defvjp(counted_forward, counted_backward)

SOLVERS = {"dpmpp": aj.DPMSolverPP(2), "heun": aj.ExponentialRK(diffrax.Heun())}
ADJOINTS = {
    "discrete": aj.DiscreteAdjoint(),
    "direct": aj.DirectAdjoint(),
    "kept": aj.DiscreteAdjoint(keep="all"),
    "deis": aj.AdjointDEIS(),
    "fewer": aj.AdjointDEIS(steps=2, order=1, mode="PEC"),
    "published": aj.AdjointDEIS(order=1, sigma_data=np.inf, published=True),
    "last-k": aj.LastK(2),
    "random-k": aj.adjoints.RandomK(jax.random.key(0), 2),
    "low-variance": aj.adjoints.LowVariance(jax.random.key(0), 3),
}


@pytest.mark.parametrize("clean_end", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.filterwarnings("ignore:The published AdjointDEIS")
def test_evaluations_are_those_that_happen(solver, adjoint, clean_end):
    process = aj.VPDiscrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 100)))
    grid = np.append(aj.grids.log_snr(process, 4), -1.0) if clean_end else aj.grids.log_snr(process, 4)
    sampler = Sampler(lambda x, t, args: counted(x + args["params"]), process, "eps", grid, SOLVERS[solver])
    x = jnp.full((1, 2, 2, 1), 0.3)
    total = lambda x, params: jnp.sum(metric(sampler(Given(params, 1.0, None, None), {"x_T": x}, ADJOINTS[adjoint])))  # noqa: E731
    CALLS.clear()
    jax.block_until_ready(jax.jit(jax.grad(total, argnums=(0, 1)))(x, jnp.asarray(0.1)))
    jax.effects_barrier()
    assert (CALLS["forward"], CALLS["backward"]) == evaluations(sampler, ADJOINTS[adjoint])


@pytest.mark.parametrize("updates", [1, 3])
def test_evaluations_of_the_greedy_gradient_are_those_that_happen(updates):
    """Of an iterate of several updates the first alone draws a sample."""
    steering, given, variables = problem(adjoint=GREEDY, driven=("x_T",))
    sampler = Sampler(lambda x, t, args: counted(x * args["params"]), PROCESS, "eps", GRID, aj.DPMSolverPP(2))
    steering = dataclasses.replace(steering, sampler=sampler, updates=updates)
    state = steering.start({"x_T": variables["x_T"]}).state
    CALLS.clear()
    jax.block_until_ready(jax.jit(steering.update)(given, state))
    jax.effects_barrier()
    looked, blind = (np.array(evaluations(sampler, GREEDY, look)) for look in (True, False))
    assert (CALLS["forward"], CALLS["backward"]) == tuple(looked + (updates - 1) * blind)


def test_guidance_counts_twice():
    plain, guided = (evaluations(problem(guided)[0].sampler, aj.DiscreteAdjoint()) for guided in (False, True))
    assert guided == tuple(2 * count for count in plain)


def test_metrics_are_what_they_say():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)))
    np.testing.assert_allclose(closeness(images[1], images)[1], 0)
    np.testing.assert_allclose(closeness(images[1], images)[0], -np.mean((images[0] - images[1]) ** 2))

    def logits(variables, images):
        return images.reshape(3, 4) * variables["params"]

    scores = [log_probability(logits, target, 2.0, images) for target in range(4)]
    np.testing.assert_allclose(jnp.sum(jnp.exp(jnp.stack(scores)), axis=0), 1.0)
