"""Coefficients of the published AdjointDEIS, and the warning that goes with it."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import gaussian

import adjoint_jax as aj
from adjoint_jax.adjoints._nodes import Rule, choose, lay_out


def test_weights_from_lam_1_3_to_0_4():
    process = aj.VPLinear()
    ts = process.t_of_lam(np.array([0.4, 1.3]))
    nodes, _ = lay_out(gaussian(process, "eps", 1.0), aj.Splitting(np.inf), ts, np.array([1, 0]), Rule(1, 1, "AB", True))
    ratio = nodes.scale[0] / nodes.scale[1]
    of_x = nodes.predict[0, 0] * nodes.scale[0] * nodes.reach[0] / nodes.scale[0] * nodes.scale[0] / nodes.scale[1]
    of_cond = nodes.gather[0] * nodes.reach[0]
    np.testing.assert_allclose([ratio, of_x, of_cond], [1.16151825168, -0.44577996447, -0.38379075303], rtol=1e-10)


def test_second_order_weights():
    """The difference of the last two V is weighted by h / (2 h_prev) times the first-order weight."""
    process = aj.VPLinear()
    ts = process.t_of_lam(np.array([0.4, 1.3, 2.0]))
    nodes, _ = lay_out(gaussian(process, "eps", 1.0), aj.Splitting(np.inf), ts, np.array([2, 1, 0]), Rule(2, 2, "AB", True))
    first = np.exp(-0.4) * np.expm1(-0.9)
    np.testing.assert_allclose(nodes.predict[1], [first * (1 + 0.9 / 1.4), -first * 0.9 / 1.4], rtol=1e-12)


@pytest.mark.parametrize(("order", "steps", "warns"), [(1, 10, True), (1, 20, False), (2, 20, True), (2, 30, False)])
def test_warning_above_the_limit(order, steps, warns):
    term, ts = gaussian(aj.VPLinear(), "eps", 1.0), aj.grids.log_snr(aj.VPLinear(), steps)
    adjoint = aj.AdjointDEIS(order, np.inf, published=True)
    with pytest.warns(UserWarning, match="unstable for steps in lam") if warns else _nothing():
        aj.sample(term, jnp.ones(2), grid=ts, adjoint=adjoint)


class _nothing:
    def __enter__(self):
        import warnings

        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("error")

    def __exit__(self, *exc):
        return self.caught.__exit__(*exc)


def test_choice_of_nodes():
    process = aj.VPLinear()
    ts = aj.grids.uniform(process, 48)
    lams = process.lam(ts)
    for kind, along in (("lam", lams), ("t", ts)):
        index = choose(ts, lams, 12, kind)
        assert (index[0], index[-1]) == (48, 0)
        assert np.all(np.diff(index) < 0)
        assert np.abs(np.diff(along[index])).max() <= 1.5 * abs(along[-1] - along[0]) / 12 + np.abs(np.diff(along)).max()
    np.testing.assert_array_equal(choose(ts, lams, 12, "index"), np.arange(48, -1, -4))
    np.testing.assert_array_equal(choose(ts, lams, None, [7, 3, 7]), [48, 7, 3, 0])
    np.testing.assert_array_equal(choose(ts, lams, 48, "t"), np.arange(48, -1, -1))
    clean = np.append(ts[:-1], 0.0)
    assert choose(clean, process.lam(clean), None, "lam")[0] == 47
