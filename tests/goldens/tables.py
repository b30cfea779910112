"""Tableaux and weights that peers bring of their own."""

from typing import Any

import diffrax
import numpy as np

import adjoint_jax as aj


class Tabulated(aj.DEIS):
    """DEIS with weights of the peer's own, `ratios` `[N]` and `values` `[N, order]`: it takes them from Riemann sums in a variable of its own."""

    ratios: Any
    values: Any

    def __init__(self, ratios: Any, values: Any):
        super().__init__(values.shape[1], "rho")
        self.ratios, self.values = ratios, values

    def table(self, process: Any, prediction: str, ts: Any) -> Any:
        return super().table(process, prediction, ts)._replace(x=np.concatenate([np.asarray(self.ratios)[:, None], self.values], axis=1))


class Root(aj.EDM):
    """alpha = 1, sigma = sqrt(t): EDM's ablation "ve"."""

    @property
    def span(self) -> tuple[Any, Any]:
        return (6400.0, 4e-6)

    def log_sigma(self, t: Any) -> Any:
        return super().log_sigma(t) / 2

    def rates(self, t: Any) -> tuple[Any, Any]:
        zero = self.log_alpha(t)
        with np.errstate(divide="ignore"):
            return zero, 0.5 / self.sigma(t)

    def t_of_lam(self, lam: Any) -> Any:
        return super().t_of_lam(2 * lam)


class Stitched(aj.solvers.EDICT):
    """EDICT whose step i ends at `ends[i]`, which is not where step i + 1 begins: the peer reads alpha off its table in two ways."""

    ends: Any

    def __init__(self, p: float, ends: Any):
        super().__init__(p)
        self.ends = ends

    def table(self, process: Any, prediction: str, ts: Any) -> Any:
        return self.rows(process, prediction, ts[:-1, None], np.asarray(self.ends), self.use(np.ones((len(ts) - 1, 1), bool), len(ts) - 1))


def tableau(name: str, a: Any, b: Any) -> diffrax.AbstractSolver:
    """An explicit Runge-Kutta solver from its Butcher tableau."""
    a, b = [np.asarray(row, np.float64) for row in a], np.asarray(b, np.float64)
    fields = {"c": np.asarray([row.sum() for row in a]), "b_sol": b, "b_error": np.zeros_like(b), "a_lower": tuple(a)}
    methods = {"tableau": diffrax.ButcherTableau(**fields), "interpolation_cls": diffrax.ThirdOrderHermitePolynomialInterpolation.from_k}
    return type(name, (diffrax.AbstractERK,), {**methods, "order": lambda self, terms: len(b)})()


HEUN = diffrax.Heun()
TABLEAUX = {
    "2heun": HEUN,
    "3heun": tableau("Heun3", [[1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "3kutta": tableau("Kutta3", [[1 / 2], [-1, 2]], [1 / 6, 2 / 3, 1 / 6]),
    "3vdh": tableau("VanDerHouwen3", [[8 / 15], [1 / 4, 5 / 12]], [1 / 4, 0, 3 / 4]),
    "4rk": tableau("RungeKutta4", [[1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}
