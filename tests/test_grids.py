"""Grids: length, ends, spacing, the published integer rules, and what they refuse."""

import numpy as np
import pytest
from models import PROCESSES, span

import adjoint_jax as aj

NAMES = ("uniform", "quadratic", "log_snr", "karras", "angle")


@pytest.mark.parametrize("process", list(PROCESSES))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 7])
def test_length_order_and_ends(name, process, steps):
    start, end = span(process)
    ts = getattr(aj.grids, name)(PROCESSES[process], steps, t_start=start, t_end=end)
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
    with pytest.raises(ValueError, match="VPDiscrete"):
        aj.grids.trailing(aj.VPLinear(), 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aj.grids.uniform(aj.VPLinear(), 0), "at least 1"),
        (lambda: aj.grids.uniform(aj.VPLinear(), 4, t_start=1.2), r"defined for t in \[0, 1\]"),
        (lambda: aj.grids.uniform(aj.VPLinear(), 4, t_start=0.1, t_end=0.5), "decrease"),
        (lambda: aj.grids.log_snr(aj.VPLinear(), 4, t_end=0.0), "infinite"),
        (lambda: aj.grids.log_snr(aj.FlowMatching(), 4), "infinite"),
        (lambda: aj.grids.edm(aj.VE(), 4), "grids.karras"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
