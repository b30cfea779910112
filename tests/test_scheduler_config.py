"""`aj.from_scheduler_config`: every class of diffusers 0.42.1 has a solver or a reason, its grids and its steps are the published ones.

That samples equal diffusers' is `tests/test_goldens.py`, whose cases are made from their configurations alone; here are the classes without goldens,
against their steps written out.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import shared

import adjoint_jax as aj
from adjoint_jax import grids
from adjoint_jax.schedulers._betas import alphas_cumprod
from adjoint_jax.schedulers._options import OPTIONS, REFUSED
from adjoint_jax.schedulers._plans import PLANS

EXPORTED = (
    "Amused", "BlockRefinement", "CMStochasticIterative", "CogVideoXDDIM", "CogVideoXDPM", "ConsistencyDecoder", "CosineDPMSolverMultistep",
    "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DDPMWuerstchen", "DEISMultistep", "DPMSolverMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "DiscreteDDIM", "EDMDPMSolverMultistep", "EDMEuler", "EntropyBound",
    "EulerAncestralDiscrete", "EulerDiscrete", "FlowMapEulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "Helios",
    "HeliosDMD", "HeunDiscrete", "IPNDM", "KDPM2AncestralDiscrete", "KDPM2Discrete", "KarrasVe", "LCM", "LMSDiscrete", "LTXEulerAncestralRF",
    "MiniMaxH3", "PNDM", "Piflow", "RFD4Proteina", "RePaint", "SASolver", "SCM", "ScoreSdeVe", "ScoreSdeVp", "TCD", "UnCLIP", "UniPCMultistep",
    "VQDiffusion",
)  # fmt: skip


@pytest.mark.parametrize("name", [f"{each}Scheduler" for each in EXPORTED])
def test_every_class_is_there_or_refused(name):
    if name in REFUSED:
        with pytest.raises(ValueError, match=name):
            aj.from_scheduler_config({"_class_name": name})
        return
    dynamic = {"clip_sample": False, "_diffusers_version": "0.42.1", "unknown": 1}
    scheduler = aj.from_scheduler_config({"_class_name": name, **dynamic})
    assert scheduler.inverse == name.endswith("InverseScheduler")
    for steps in (4, 10):
        grid, solver = scheduler.grid(steps), scheduler.solver(steps)
        solver.table(scheduler.process, scheduler.prediction, grid[::-1] if scheduler.inverse else grid)
        assert steps - 1 <= len(grid) - 1 <= steps or name.startswith("DPMSolverSinglestep")


def test_the_table_is_whole():
    assert set(OPTIONS) == set(PLANS)
    assert {f"{each}Scheduler" for each in EXPORTED} == set(OPTIONS) | set(REFUSED)
    assert not set(OPTIONS) & set(REFUSED)


ERRORS = {
    "class": ({"_class_name": "MyScheduler"}, {}, "'MyScheduler' is not known here"),
    "spacing": ({"timestep_spacing": "even"}, {}, "timestep_spacing='even'"),
    "two spacings": ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "use_karras_sigmas and"),
    "variance": ({"variance_type": "learned_range"}, {}, "variance_type='learned_range'"),
    "variance of DPM-Solver": ({"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned"}, {}, "variance_type='learned'"),
    "eps to zero": ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, {}, "final_sigmas_type='zero'"),
    "algorithm": ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "euler"}, {}, "algorithm_type='euler'"),
    "stochastic stages": ({"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"}, {}, "algorithm_type="),
    "order": ({"_class_name": "DEISMultistepScheduler", "solver_order": 4}, {}, "solver_order=4"),
    "inner solver": ({"_class_name": "UniPCMultistepScheduler", "solver_p": {}}, {}, "solver_p={}"),
    "corrected end": (
        {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, {}, "set final_sigmas_type",
    ),
    "corrected end of SA": ({"_class_name": "SASolverScheduler", "use_karras_sigmas": True}, {}, "corrects the state"),
    "beyond the table": ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_max": 700.0}, {}, "sigma_max=700.0"),
    "PNDM's v": ({"_class_name": "PNDMScheduler", "prediction_type": "v_prediction"}, {}, "prediction_type='v_prediction'"),
    "PNDM's end": ({"_class_name": "PNDMScheduler", "set_alpha_to_one": True}, {}, "set_alpha_to_one=True"),
    "uneven strides": ({"_class_name": "PNDMScheduler", "timestep_spacing": "trailing", "skip_prk_steps": True}, {}, "a number that divides 1000"),
    "clipped inversion": ({"_class_name": "DDIMInverseScheduler"}, {}, "clip_sample=True"),
    "clipped end": ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, {}, "set_alpha_to_one=False clips"),
    "two times at one level": ({"_class_name": "KDPM2AncestralDiscreteScheduler", "use_karras_sigmas": True}, {}, "use_karras_sigmas=True"),
    "renoised flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, {}, "stochastic_sampling=True"),
    "no mu": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, {}, "needs mu"),
    "mu": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"mu": 1.0}, "leave mu None"),
    "eta": ({"_class_name": "EulerDiscreteScheduler"}, {"eta": 1.0}, "leave eta 0"),
    "betas": ({"beta_schedule": "exp"}, {}, "beta_schedule='exp'"),
    "EDM's prediction": ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, {}, "prediction_type='sample'"),
    "noise of eta": ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, {"eta": 0.5}, "eta=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    config, more, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        aj.from_scheduler_config(config, **more).solver(7)


def test_wrong_numbers_of_steps():
    with pytest.raises(ValueError, match="at least 1"):
        aj.from_scheduler_config({}).grid(0)
    solver = aj.from_scheduler_config({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "clip_sample": False}).solver(7)
    with pytest.raises(ValueError, match="got 7 for 3 steps"):
        solver.table(aj.VPLinear(), "eps", np.linspace(1.0, 0.1, 4))
    with pytest.raises(TypeError, match="without memory"):
        aj.solvers.Prescribed(aj.DEIS())


NAMES = {
    "DDIM": "DDIMScheduler", "DPMM": "DPMSolverMultistepScheduler", "DEIS": "DEISMultistepScheduler", "UniPC": "UniPCMultistepScheduler",
    "Euler": "EulerDiscreteScheduler", "Heun": "HeunDiscreteScheduler", "FMEuler": "FlowMatchEulerDiscreteScheduler",
}  # fmt: skip
BETAS = {"lin": "linear", "scaled": "scaled_linear", "cos": "squaredcos_cap_v2"}
LEVELS = {"karras": "use_karras_sigmas", "exp": "use_exponential_sigmas", "beta": "use_beta_sigmas", "lu": "use_lu_lambdas"}


def of_key(family, name):
    """The configuration behind a key of the published grids, and mu."""
    config = {"_class_name": NAMES[family], "clip_sample": False}
    if "-" in name:
        betas, spacing = name.split("-")
        config["beta_schedule"] = BETAS[betas]
        if betas == "scaled":
            config |= {"beta_start": 0.00085, "beta_end": 0.012}
        if spacing in LEVELS:
            return config | {LEVELS[spacing]: True}, None
        return config | ({"final_sigmas_type": "sigma_min"} if spacing == "smin" else {"timestep_spacing": spacing}), None
    if name.startswith("mu"):
        return config | {"use_dynamic_shifting": True}, float(name[2:])
    shift = float(name.strip("abcdefghijklmnopqrstuvwxyz"))
    if family == "FMEuler":
        return config | {"shift": shift}, None
    return config | {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}, None


def test_published_grids():
    """Levels sigma/alpha and model times of every float64 grid, to 1e-10; Heun's repeat each level."""
    with np.load(shared("golden/golden_schedules.npz")) as data:
        golden = {key: data[key] for key in data.files if key.split("/")[0] in NAMES and "/f64/" in key}
    seen = 0
    for key in {key.rsplit("/", 1)[0] for key in golden}:
        family, name, steps, _ = key.split("/")
        config, mu = of_key(family, name)
        scheduler, steps = aj.from_scheduler_config(config, mu=mu), int(steps[1:])
        plan, told = scheduler._plan(steps), golden[f"{key}/timesteps"]
        process, ts = scheduler.process, plan.ladder.ts
        told = np.append(told[:1], told[1::2]) if family == "Heun" else told
        flow = isinstance(process, aj.FlowMatching)
        found = (1000 * ts[:-1] if flow else ts[:-1]) if plan.ladder.told is None else plan.ladder.told
        np.testing.assert_allclose(found, told[: len(found)], rtol=1e-10, atol=1e-9, err_msg=key)
        if f"{key}/sigmas" in golden:
            levels = golden[f"{key}/sigmas"]
            levels = np.concatenate([levels[:1], levels[1:-1:2], levels[-1:]]) if family == "Heun" else levels
            found = ts if flow else np.exp(-process.lam(ts))
            np.testing.assert_allclose(found, levels[: len(found)], rtol=1e-10, atol=1e-14, err_msg=key)
            assert len(levels) == len(found) + plan.ladder.still
        seen += 1
    assert seen > 100


def network(x, t, args):
    """Any function of both that a step can tell from another."""
    return args * jnp.tanh(x + jnp.sin(0.01 * jnp.asarray(t, x.dtype))) + 0.3 * x


def told(x, t):
    return 0.5 * np.tanh(x + np.sin(0.01 * t)) + 0.3 * x


def run(config, steps, x, noise=None, **more):
    scheduler = aj.from_scheduler_config(config, **more)
    term = aj.DiffusionTerm(scheduler.network(network, steps), scheduler.process, scheduler.prediction)
    noise = None if noise is None else jnp.asarray(noise)
    return aj.sample(term, jnp.asarray(x), 0.5, grid=scheduler.grid(steps), solver=scheduler.solver(steps), noise=noise)


@pytest.fixture
def draws():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 3)), rng.normal(size=(7, 2, 3))


def ddim_by_hand(x, z, eta, clip, steps=7):
    """Song et al. (2021) as diffusers has it: the state moves by a stride, eps is that of the x0 before it is clipped."""
    abar = alphas_cumprod({"_class_name": "DDIMScheduler"})
    for i, t in enumerate(np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1):
        a, b = abar[t], abar[t - 1000 // steps] if t >= 1000 // steps else 1.0
        eps = told(x, t)
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        s = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = np.sqrt(b) * (np.clip(x0, -0.5, 0.5) if clip else x0) + np.sqrt(1 - b - s**2) * eps + s * z[i]
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(draws, eta, clip):
    x, z = draws
    config = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "clip_sample": clip, "clip_sample_range": 0.5}
    found = run(config, 7, x, z if eta else None, eta=eta)
    np.testing.assert_allclose(found, ddim_by_hand(x, z, eta, clip), rtol=0, atol=1e-12)


def test_ddpm_with_the_larger_variance(draws):
    """Ho et al. (2020), eqs. (7) and (11), sigma^2 = beta."""
    x, z = draws
    abar, ts = alphas_cumprod({}), np.arange(7)[::-1] * 142
    found = run({"variance_type": "fixed_large", "clip_sample_range": 0.8}, 7, x, z)
    for i, t in enumerate(ts):
        a, b = abar[t], abar[ts[i + 1]] if t else 1.0
        x0 = np.clip((x - np.sqrt(1 - a) * told(x, t)) / np.sqrt(a), -0.8, 0.8)
        mean = np.sqrt(b) * (1 - a / b) / (1 - a) * x0 + np.sqrt(a / b) * (1 - b) / (1 - a) * x
        x = mean + (np.sqrt(1 - a / b) * z[i] if t else 0)
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)


def test_euler_ancestral(draws):
    """Karras et al.'s coordinates there, ours here: x_T = scale * z in place of init_noise_sigma * z."""
    x, z = draws
    config = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    abar, ts = alphas_cumprod(config), np.round(np.arange(1000, 0, -1000 / 7)).astype(int) - 1
    levels = np.append(np.sqrt((1 - abar) / abar)[ts], 0.0)
    scale = aj.from_scheduler_config(config).scale(7)
    found = run(config, 7, scale * x, z)
    x = x * levels[0]
    for i, t in enumerate(ts):
        s, e = levels[i : i + 2]
        up = np.sqrt(e**2 * (s**2 - e**2) / s**2)
        x = x + told(x / np.sqrt(s**2 + 1), t) * (np.sqrt(e**2 - up**2) - s) + up * z[i]
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)


def test_heun_of_a_flow(draws):
    x, _ = draws
    found = run({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, 6, x)
    least = grids.shift_time(1e-3, 3.0)
    ts = np.append(grids.shift_time(np.linspace(1, least, 6), 3.0), 0.0)
    for s, e in pairwise(ts):
        one = told(x, 1000 * s)
        two = told(x + (e - s) * one, 1000 * e) if e else one
        x = x + (e - s) * (one + two) / 2
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)


def test_inversion_undoes_ddim_but_for_its_error(draws):
    """DDIM inversion, on the grid of the scheduler: of first order."""
    x, _ = draws
    found = []
    for steps in (50, 100):
        there = aj.from_scheduler_config({"_class_name": "DDIMInverseScheduler", "clip_sample": False}, published=False)
        term = aj.DiffusionTerm(there.network(network, steps), there.process, there.prediction)
        x_T = aj.invert(term, jnp.asarray(x), 0.5, grid=there.grid(steps), solver=there.solver(steps))
        back = aj.sample(term, x_T, 0.5, grid=there.grid(steps), solver=there.solver(steps))
        found.append(float(np.abs(back - x).max()))
    assert found[1] < 0.6 * found[0]


def test_gradients_are_exact(draws):
    """Through prescribed ends and a clipped x0 whose eps is not: DiscreteAdjoint is autodiff."""
    x, z = draws
    config = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "clip_sample": True, "clip_sample_range": 0.5}
    scheduler = aj.from_scheduler_config(config, eta=0.6)
    grid, solver = scheduler.grid(7), scheduler.solver(7)

    def loss(x, z, scale, adjoint):
        term = aj.DiffusionTerm(scheduler.network(network, 7), scheduler.process, scheduler.prediction)
        return jnp.sum(aj.sample(term, x, scale, grid=grid, solver=solver, noise=z, adjoint=adjoint) ** 2)

    gradients = [jax.grad(loss, (0, 1, 2))(jnp.asarray(x), jnp.asarray(z), jnp.asarray(0.5), a) for a in (aj.DirectAdjoint(), aj.DiscreteAdjoint())]
    for one, two in zip(*gradients, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-12)


def test_corrected_forms():
    """Unpublished: the network is told the time of its state, x0 and eps agree, third orders are whole."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "solver_order": 3}
    rules = [aj.from_scheduler_config(config, published=published).solver(20).rule for published in (True, False)]
    assert rules == ["halved", "midpoint"]
    scheduler = aj.from_scheduler_config(config, published=False)
    assert scheduler.network(lambda x, t, args: t + 0 * x, 20)(jnp.zeros(1), 12.25, None)[0] == 12.25


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "DDIMScheduler", "EDMEulerScheduler"])
def test_one_trace_and_single_precision(name):
    """Wrappers made twice are equal as pytrees, and float32 stays float32, close to float64."""
    scheduler = aj.from_scheduler_config({"_class_name": name, "clip_sample_range": 1.0})
    one, two = (jax.tree.structure(scheduler.network(network, 8)) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    term = aj.DiffusionTerm(scheduler.network(network, 8), scheduler.process, scheduler.prediction)
    assert type(scheduler.scale(8)) is float  # a numpy scalar would raise the dtype of x_T
    x = np.linspace(-2, 2, 6) * scheduler.scale(8)
    found = [
        aj.sample(term, jnp.asarray(x, d), jnp.asarray(0.5, d), grid=scheduler.grid(8), solver=scheduler.solver(8))
        for d in (jnp.float32, jnp.float64)
    ]
    assert found[0].dtype == jnp.float32
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)
