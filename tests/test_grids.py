"""Grids: length, ends, spacing, the published integer rules, and what they refuse."""

from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pytest
from models import PROCESSES, span

import adjoint_jax as aj
from adjoint_jax.grids import _ays
from adjoint_jax.search import cheapest_nodes

SPACINGS = {
    name: getattr(aj.grids, name)
    for name in ("uniform", "power", "quadratic", "log_snr", "polyexponential", "karras", "beta", "vp", "angle", "shifted")
}
SPACINGS |= {
    "power 7": partial(aj.grids.power, rho=7.0),
    "polyexponential 0.8": partial(aj.grids.polyexponential, rho=0.8),
    "vp 2": partial(aj.grids.vp, rho=2.0),
    "vp fitted": partial(aj.grids.vp, fit=1e-3),
    "shifted down": partial(aj.grids.shifted, shift=0.4),
}
CLEAN = [name for name in PROCESSES if name != "ve"]
SD = aj.VPDiscrete(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))


@pytest.mark.parametrize("process", list(PROCESSES))
@pytest.mark.parametrize("name", list(SPACINGS))
@pytest.mark.parametrize("steps", [1, 7])
def test_length_order_and_ends(name, process, steps):
    start, end = span(process)
    ts = SPACINGS[name](PROCESSES[process], steps, t_start=start, t_end=end)
    assert ts.shape == (steps + 1,)
    assert ts.dtype == np.float64
    assert (ts[0], ts[-1]) == (start, end)
    assert np.all(np.diff(ts) < 0)


def test_spacing():
    process = aj.VPLinear()
    even = {
        "uniform": lambda ts: ts,
        "quadratic": np.sqrt,
        "log_snr": process.lam,
        "karras": lambda ts: np.exp(-process.lam(ts) / 7),
        "angle": lambda ts: np.arctan2(process.sigma(ts), process.alpha(ts)),
    }
    for name, variable in even.items():
        steps = np.diff(variable(getattr(aj.grids, name)(process, 9)))
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("process", CLEAN)
@pytest.mark.parametrize("name", list(SPACINGS))
def test_final_step(name, process):
    start, end = span(process)
    make = partial(SPACINGS[name], PROCESSES[process], t_start=start, t_end=end)
    appended, replaced = make(5, final="append_zero"), make(5, final="replace_by_zero")
    np.testing.assert_array_equal(appended[:-1], make(4))
    np.testing.assert_array_equal(replaced[:-1], make(5)[:-1])
    for ts in (appended, replaced):
        assert PROCESSES[process].sigma(ts[-1]) == 0
        assert np.all(np.diff(ts) < 0)


def test_spacing_in_other_variables():
    process = aj.EDM()
    made = {
        "power": (aj.grids.power(process, 9, rho=3.0), np.cbrt),
        "polyexponential": (aj.grids.polyexponential(process, 9, rho=0.5), lambda ts: np.log(ts / 0.002) ** 2),
        "vp": (aj.grids.vp(process, 9), lambda ts: aj.VPLinear().t_of_lam(-np.log(ts))),
        "vp, fitted": (aj.grids.vp(process, 9, fit=0.01, rho=2.0), lambda ts: np.sqrt(fitted(ts, 0.01))),
        "beta": (aj.grids.beta(process, 9, a=0.5, b=0.5), lambda ts: np.arcsin(np.sqrt((ts - 0.002) / (80 - 0.002)))),  # the arcsine law
        "shifted": (aj.grids.shifted(process, 9, shift=3.0), lambda ts: ts / (3 + ts)),  # u of s = ts/(1 + ts)
    }
    for name, (ts, variable) in made.items():
        steps = np.diff(variable(ts))
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-7, err_msg=name)


def fitted(sigma, fit):
    """The VP time u with u = 1 at sigma = 80 and u = fit at sigma = 0.002: the root of log(1 + sigma^2) = a u^2 + b u."""
    a, b = np.linalg.solve([[1, 1], [fit**2, fit]], np.log1p(np.array([80.0, 0.002]) ** 2))
    level = np.log1p(sigma**2)
    return 2 * level / (b + np.sqrt(b**2 + 4 * a * level))


def test_a_shift_moves_lam():
    flow = aj.FlowMatching()
    ts = aj.grids.uniform(flow, 8, t_start=0.9, t_end=0.1)
    np.testing.assert_allclose(flow.lam(aj.grids.shift_time(ts, 3.0)), flow.lam(ts) - np.log(3), rtol=1e-12)
    np.testing.assert_allclose(aj.grids.shift_time(aj.grids.shift_time(ts, 3.0), 1 / 3), ts, rtol=1e-14)
    np.testing.assert_array_equal(aj.grids.shifted(flow, 4, shift=1.0), aj.grids.uniform(flow, 4))
    assert aj.grids.shifted(flow, 28)[0] == 1  # from pure noise: no infinite lam on the way


@pytest.mark.parametrize("final", ["append_zero", "replace_by_zero", "sigma_min"])
def test_terminal_stretches_the_flow(final):
    flow, end = aj.FlowMatching(), 0.01
    plain, ts = (aj.grids.shifted(flow, 6, t_end=end, final=final, terminal=terminal) for terminal in (None, 0.05))
    last = -1 if final == "sigma_min" else -2
    assert ts[last] == pytest.approx(0.05, rel=1e-12)
    ratio = (1 - ts[1:last]) / (1 - plain[1:last])
    np.testing.assert_allclose(ratio, 0.95 / (1 - plain[last]), rtol=1e-12)


def test_edm_grid_is_the_published_one():
    ts = aj.grids.edm(aj.EDM(), 18, t_start=80.0, t_end=0.002)
    ramp = np.linspace(0, 1, 18)
    np.testing.assert_allclose(ts[:-1], (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rtol=1e-12)
    assert ts[-1] == 0


def test_trailing_and_leading_count_training_steps():
    process = PROCESSES["vp_discrete"]
    np.testing.assert_array_equal(aj.grids.trailing(process, 5), [999, 799, 599, 399, 199, -1])
    np.testing.assert_array_equal(aj.grids.leading(process, 5), [800, 600, 400, 200, 0, -1])
    np.testing.assert_array_equal(aj.grids.leading(process, 7, offset=1), [853, 711, 569, 427, 285, 143, 1, -1])
    np.testing.assert_array_equal(aj.grids.linspace(process, 4), [999, 666, 333, 0, -1])
    np.testing.assert_array_equal(aj.grids.linspace(process, 4, final="replace_by_zero"), [999, 749, 500, 250, -1])
    np.testing.assert_array_equal(aj.grids.linspace(process, 4, final="sigma_min"), [999, 749, 500, 250, 0])
    np.testing.assert_array_equal(aj.grids.leading(process, 4, final="replace_by_zero", offset=1), [801, 601, 401, 201, -1])
    np.testing.assert_array_equal(aj.grids.trailing(process, 4, final="sigma_min"), [999, 749, 499, 249, 0])
    assert 444 in aj.grids.linspace(process, 18, final="sigma_min")
    assert 500 in aj.grids.linspace(process, 18, final="sigma_min")  # 499.5: halves to the even number
    with pytest.raises(ValueError, match="VPDiscrete"):
        aj.grids.trailing(aj.VPLinear(), 5)


def test_halves_fall_as_they_do_in_numpy():
    """For many numbers of steps a stride ends at a half but for rounding error, and the order of operations decides."""
    for steps in range(2, 150):
        ascending = np.linspace(0, 999, steps + 1).round()[::-1]
        np.testing.assert_array_equal(aj.grids.linspace(SD, steps, final="replace_by_zero")[:-1], ascending[:-1])
        np.testing.assert_array_equal(aj.grids.linspace(SD, steps)[:-1], np.linspace(0, 999, steps).round()[::-1])
        np.testing.assert_array_equal(aj.grids.trailing(SD, steps)[:-1], np.arange(1000, 0, -1000 / steps).round()[:steps] - 1)
    assert len(np.arange(1000, 0, -1000 / 61)) == 62  # the reference then takes a 62nd step, at t = -1


def test_model_times():
    ts = aj.grids.karras(SD, 6)
    told = aj.grids.model_times(SD, ts)
    assert np.max(np.abs(told - ts)) < 0.1  # the same level, interpolated otherwise
    np.testing.assert_array_equal(aj.grids.model_times(SD, ts, rounding="round"), np.round(told))
    np.testing.assert_array_equal(aj.grids.model_times(SD, ts, rounding="truncate"), np.floor(told))
    for between in ("sigma", "log_sigma"):
        times = aj.grids.model_times(SD, ts, between=between)
        np.testing.assert_allclose(aj.grids.at_model_times(SD, times, between=between), ts, rtol=1e-9, atol=1e-9)
    whole = aj.grids.linspace(SD, 9)
    np.testing.assert_allclose(aj.grids.model_times(SD, whole[:-1]), whole[:-1], atol=1e-9)
    np.testing.assert_allclose(aj.grids.model_times(aj.FlowMatching(), np.array([1.0, 0.25])), [1000, 250])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_align_your_steps(family):
    ts = aj.grids.ays(SD, family=family)
    assert len(ts) == 11
    assert ts[-1] == -1
    published = np.array(_ays.TRAINING_STEPS[family])
    assert np.max(np.abs(ts[:-1] - published)) < 0.6  # its levels and its steps are both rounded
    np.testing.assert_allclose(np.exp(-SD.lam(ts[:-1])), _ays.LEVELS[family], rtol=1e-4)
    finer = aj.grids.ays(aj.EDM(), 19, family=family)
    np.testing.assert_allclose(finer[:-1:2], _ays.LEVELS[family], rtol=1e-12)
    np.testing.assert_allclose(finer[1:-1:2] ** 2, finer[:-3:2] * finer[2:-1:2], rtol=1e-12)
    assert aj.grids.ays(aj.EDM(), 4, t_start=9.0, t_end=0.2, final="sigma_min")[[0, -1]].tolist() == [9.0, 0.2]


def test_zero_terminal_snr():
    abar = SD.alphas_cumprod
    exact = aj.grids.zero_terminal_snr(abar, floor=0.0)
    assert exact[-1] == 0
    assert exact[0] == pytest.approx(abar[0], rel=1e-14)
    process = aj.VPDiscrete(aj.grids.zero_terminal_snr(abar))  # a table that decreases, and ends above zero
    assert process.alphas_cumprod[-1] == 2.0**-24
    assert np.all(np.diff(aj.grids.trailing(process, 10)) < 0)


def test_gits_takes_the_cheapest_way():
    cost = np.random.default_rng(0).uniform(size=(9, 9))
    for steps in (1, 2, 4, 8):
        nodes = cheapest_nodes(cost, steps, coefficient=1.1)
        price = lambda nodes: sum(1.1**k * cost[i, j] for k, (i, j) in enumerate(pairwise(nodes)))  # noqa: E731
        ways = ([0, *inner, 8] for inner in combinations(range(1, 8), steps - 1))
        assert price(nodes) == pytest.approx(min(map(price, ways)), rel=1e-14)
    with pytest.raises(ValueError, match="1 to 8"):
        cheapest_nodes(cost, 9)
    with pytest.raises(ValueError, match="square"):
        cheapest_nodes(cost[:4], 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aj.grids.uniform(aj.VPLinear(), 0), "at least 1"),
        (lambda: aj.grids.uniform(aj.VPLinear(), 4, t_start=1.2), r"defined for t in \[0, 1\]"),
        (lambda: aj.grids.uniform(aj.VPLinear(), 4, t_start=0.1, t_end=0.5), "decrease"),
        (lambda: aj.grids.log_snr(aj.VPLinear(), 4, t_end=0.0), "infinite"),
        (lambda: aj.grids.log_snr(aj.FlowMatching(), 4), "infinite"),
        (lambda: aj.grids.edm(aj.VE(), 4), "grids.karras"),
        (lambda: aj.grids.karras(aj.VE(), 4, final="append_zero"), "final='sigma_min'"),
        (lambda: aj.grids.karras(aj.EDM(), 1, final="append_zero"), "at least 2 steps"),
        (lambda: aj.grids.uniform(aj.FlowMatching(), 4, final="append_zero"), "give a t_end above 0"),
        (lambda: aj.grids.beta(aj.FlowMatching(), 4), "infinite"),
        (lambda: aj.grids.vp(aj.FlowMatching(), 4), "infinite"),
        (lambda: aj.grids.linspace(aj.EDM(), 4), "VPDiscrete"),
        (lambda: aj.grids.linspace(SD, 0), "at least 1"),
        (lambda: aj.grids.linspace(SD, 1001), "decrease strictly"),
        (lambda: aj.grids.linspace(SD, 4, t_start=2000.0), r"defined for t in \[-1, 999\]"),
        (lambda: aj.grids.model_times(aj.EDM(), np.array([1.0])), "VPDiscrete"),
        (lambda: aj.grids.shifted(aj.FlowMatching(), 4, shift=0.0), "positive"),
        (lambda: aj.grids.shifted(aj.FlowMatching(), 4, terminal=1.5), "between 0 and 1"),
        (lambda: aj.grids.ays(SD, family="sd3"), "sd15, sdxl, svd"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
