"""Every grid of `golden_schedules.npz`: what the references' own code gave, in float64 and as they ship, in float32.

Two things are compared: `sigmas`, the levels sigma/alpha of the state (sigma of a flow), which our grid's times must have, and `timesteps`, what the
reference tells its network. The float32 grids are reproduced on the float32 table of abar.
"""

import re

import numpy as np
import pytest
from shared import shared

import adjoint_jax as aj
from adjoint_jax import grids
from adjoint_jax.schedulers._betas import alphas_cumprod
from adjoint_jax.search import cheapest_nodes

BETAS = {"lin": "linear", "scaled": "scaled_linear", "cos": "squaredcos_cap_v2"}
DISC = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
LEVELS = {"karras": grids.karras, "exp": grids.exponential, "beta": grids.beta, "lu": grids.lu}
INTEGERS = {"linspace": grids.linspace, "smin": grids.linspace, "leading": grids.leading, "trailing": grids.trailing}
LU = {"time_uniform": grids.uniform, "time_quadratic": grids.quadratic, "logSNR": grids.log_snr}
FLOW_STEPS = 1000


def table(scheduler, betas, single):
    """abar of a scheduler's defaults; `single` as torch does it: float32 betas, products accumulated in float64 and rounded each."""
    config = {"_class_name": "HeunDiscreteScheduler"} if scheduler == "Heun" else {}
    if betas == "scaled":
        config |= {"beta_start": 0.00085, "beta_end": 0.012}
    abar = alphas_cumprod({**config, "beta_schedule": BETAS[betas]})
    if not single:
        return abar
    raw = np.float32(1 - abar / np.append(1, abar[:-1]))
    return np.float64(np.float32(np.cumprod(np.float64(np.float32(1) - raw))))


def rho(process, ts):
    return np.exp(-process.lam(ts))


def discrete(scheduler, name, steps, single):
    """(timesteps, sigmas) of a scheduler on a table."""
    betas, spacing = name.split("-")
    process = aj.VPDiscrete(table(scheduler, betas, single))
    fractional = scheduler in ("Euler", "Heun")  # the network is told fractional training steps
    if spacing in LEVELS:
        nodes = LEVELS[spacing](process, steps - 1)
        rounds = spacing == "karras" or spacing == "lu"
        truncates = not rounds or (scheduler == "DPMM" and betas == "cos")
        rounding = None if fractional else "truncate" if truncates else "round"
        told = grids.model_times(process, nodes, rounding=rounding, single=single and spacing != "lu")
        ts = LEVELS[spacing](process, steps, final="append_zero")
        levels = rho(process, ts)
        if scheduler == "DEIS":  # its last step goes nowhere: a grid of one step less, the last level twice
            levels = rho(process, np.append(nodes, nodes[-1]))
    elif fractional and spacing == "linspace":
        told = grids.uniform(process, steps - 1)
        levels = np.append(rho(process, grids.at_model_times(process, told)), 0)
    else:
        final = "append_zero" if scheduler == "DDIM" or fractional else "sigma_min" if scheduler == "DEIS" or spacing == "smin" else "replace_by_zero"
        ts = INTEGERS[spacing](process, steps, final=final)
        told, levels = ts[:-1], rho(process, ts)
    if scheduler == "Heun":  # every level but the first is visited twice
        told = np.append(told[:1], np.repeat(told[1:], 2))
        levels = np.concatenate([levels[:1], np.repeat(levels[1:-1], 2), levels[-1:]])
    return told, levels


def karras_edm(name, steps):
    """EDMDPMSolverMultistepScheduler: 80 to 0.002, then 0; the network is told log(sigma)/4."""
    spacing = {"karras": grids.karras, "exp": grids.exponential}[name]
    ts = spacing(aj.EDM(), steps, final="append_zero")
    return np.log(ts[:-1]) / 4, ts


def flow(scheduler, name, steps):
    """Schedulers of flow matching, T = 1000 training steps."""
    process, least = aj.FlowMatching(), 1 / FLOW_STEPS
    if name.startswith("mu"):
        shift = end = np.exp(float(name[2:]))
    else:
        shift = end = float(re.sub("[a-z]+", "", name))
    if scheduler == "FMEuler":
        # Without mu the least sigma is shifted twice: when the scheduler is made, and with the grid.
        end = grids.shift_time(least, end) if name.startswith("shift") else least
        ts = grids.shifted(process, steps, t_end=grids.shift_time(end, shift), final="append_zero", shift=shift)
        return grids.model_times(process, ts[:-1]), ts
    if scheduler == "DPMM":
        ts = grids.shifted(process, steps, t_start=grids.shift_time(1 - least, shift), shift=shift)
    else:
        ts = grids.shifted(process, steps, t_end=grids.shift_time(least, shift), final="replace_by_zero", shift=shift)
        ts[0] -= 1e-6  # alpha = 0 is avoided
    return grids.model_times(process, ts[:-1], rounding="truncate"), ts


def lu(name, steps):
    """DPM-Solver's own code: t in [t_end, 1], of a table (i + 1)/N; the network is told t, or (t - 1/N) 1000."""
    schedule, skip, end = re.fullmatch(r"(\w+?)-(\w+)-tend([\d.]+)", name).groups()
    if schedule == "linear":
        process = aj.VPLinear()
        ts = LU[skip](process, steps, t_end=float(end))
        return {"t": ts, "lambda": process.lam(ts), "model_t": ts}
    betas = {"discrete": "lin", "discrete_scaled": "scaled", "discrete_cos": "cos"}[schedule]
    total = 996 if betas == "cos" else 1000  # of the cosine table the steps with lam < -5.1 are left out
    process = aj.VPDiscrete(table("DPMM", betas, False)[:total])
    ts = LU[skip](process, steps)
    # Of 996 steps the network is told those of 1000 (quirks.txt): its noise level is not the state's.
    return {"t": (ts + 1) / total, "lambda": process.lam(ts), "model_t": ts * 1000 / total}


def deis(name, steps):
    process = aj.VPLinear()
    phase, rho = re.fullmatch(r"([a-z]+)(\d)", name).groups()
    return {"t": grids.power, "rho": grids.karras}[phase](process, steps, rho=float(rho)) if phase != "log" else grids.log_snr(process, steps)


def k_diffusion(name, steps):
    process, ends = aj.EDM(), {"t_start": 20.0, "t_end": 0.02}
    if name == "vp":
        other = aj.VPLinear()
        return grids.vp(process, steps, t_start=rho(other, 1.0), t_end=rho(other, 1e-3), final="append_zero")
    spacing = {"karras": grids.karras, "exp": grids.exponential, "poly": grids.polyexponential}[name]
    return spacing(process, steps, **ends, final="append_zero", **({"rho": 0.8} if name == "poly" else {}))


def diff_sampler(name, steps):
    process, (kind, power) = aj.EDM(), re.fullmatch(r"([a-z_]+)(\d)", name).groups()
    if kind == "time_uniform":
        return grids.vp(process, steps - 1, rho=float(power), fit=1e-3)
    return grids.karras(process, steps - 1) if kind == "polynomial" else grids.log_snr(process, steps - 1)


def tables(name, quantity):
    abar = alphas_cumprod({"beta_schedule": DISC[name], **({"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {})})
    if quantity == "log_alpha":
        return aj.VPDiscrete(abar).log_alpha(np.arange(len(abar)))
    if quantity == "zsnr_betas":
        abar = grids.zero_terminal_snr(abar, floor=0.0)
    return 1 - abar / np.append(1, abar[:-1])


def made(key):
    """What the package makes of a key."""
    family, name, *rest = key.split("/")
    if family == "disc":
        return tables(name, rest[0])
    steps, single, quantity = int(rest[0][1:]), "f32" in rest, rest[-1]
    if family == "lu":
        return lu(name, steps)[quantity]
    if family in ("deis", "kd", "ds"):
        return {"deis": deis, "kd": k_diffusion, "ds": diff_sampler}[family](name, steps)
    if family == "EDMDPM":
        told, levels = karras_edm(name, steps)
    elif "-" in name:
        told, levels = discrete(family, name, steps, single)
    else:
        told, levels = flow(family, name, steps)
    return told if quantity == "timesteps" else levels


FAMILIES = ("DDIM", "DPMM", "DEIS", "UniPC", "Euler", "Heun", "EDMDPM", "FMEuler", "lu", "deis", "kd", "ds", "disc")
OTHERS = {"cfg": "guidance, no grid", "gits": "below"}
WHOLE = ("DDIM", "DPMM", "DEIS", "UniPC")


@pytest.fixture(scope="module")
def golden():
    with np.load(shared("golden/golden_schedules.npz")) as data:
        return dict(data)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_grid(golden, family):
    keys = [key for key in golden if key.startswith(family + "/")]
    assert keys
    for key in keys:
        got, want = made(key), golden[key]
        if key.endswith("timesteps") and family in WHOLE:
            np.testing.assert_array_equal(got, want, err_msg=key)
        elif "/f32/" in key:  # two units in the last place of the largest time; levels to float32's precision in a seventh power
            times = key.endswith("timesteps")
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=2.0**-22 * np.max(np.abs(want)) if times else 0, err_msg=key)
        else:  # the absolute error only where a time is zero up to rounding error
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=0 if key.endswith("sigmas") else 1e-11, err_msg=key)


def test_no_key_is_left_out(golden):
    assert {key.split("/")[0] for key in golden} == {*FAMILIES, *OTHERS}


def test_gits_finds_the_published_nodes(golden):
    cases = [re.fullmatch(r"gits/dp(\d+)_n(\d+)_c([\d.]+)", key) for key in golden]
    cases = [case for case in cases if case]
    assert len(cases) == 12
    for case in cases:
        nodes = cheapest_nodes(golden[f"gits/cost{case[1]}"], int(case[2]) - 1, coefficient=float(case[3]))
        np.testing.assert_array_equal(nodes, golden[case[0]], err_msg=case[0])
