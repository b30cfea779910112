"""The published multistep samplers, as rows of one table: (sigma_data, tau, variable, order, rule)."""

from typing import Any

import equinox as eqx
import numpy as np

from ..splitting import Splitting
from .multistep import AbstractMultistep, checked_order, checked_variable


class _Multistep(AbstractMultistep):
    """The fields of every multistep method."""

    splitting: Splitting
    variable: str = eqx.field(static=True)
    steps_back: int = eqx.field(static=True)
    rule: str = eqx.field(static=True)
    lower_order_final: Any = eqx.field(static=True)

    def _set(self, order: int, most: int, splitting: Splitting, variable: str = "lam", rule: str = "exact", lower_order_final: Any = False):
        self.steps_back = checked_order(order, most, type(self).__name__)
        self.splitting, self.variable = splitting, checked_variable(variable, splitting)
        self.rule, self.lower_order_final = rule, lower_order_final


class DEIS(_Multistep):
    """Adams-Bashforth on eps in the noise splitting (sigma_data infinite), the polynomial in t, rho or lam; one evaluation a step.

    Order k, measured 2.0, 2.9 to 3.0 and 3.9 to 4.3 for k = 2, 3, 4; `published` "ipndm_v" 2.8 on even steps in lam.

    Args:
        order: 1 to 4; order k is tAB-(k-1) of the paper and diffusers' order k.
        variable: "t" (tAB-DEIS), "rho" (rhoAB-DEIS, k-diffusion's LMS) or "lam" (diffusers' log-rho).
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`.
        published: the weights of "t" and "rho" by left Riemann sums of 10 000 terms as in the authors' code, whose own error remains;
            "ipndm_v", for "rho" and orders up to 3, diff-sampler's iPNDM_v with its misplaced bracket, of order 2 on uneven grids.
    Raises:
        ValueError: for another order, variable or `published`.
    Reference: Zhang & Chen, DEIS (ICLR 2023), tAB- and rhoAB-DEIS; its weights by exact integrals.

        aj.sample(term, x_T, args, grid=ts, solver=aj.DEIS(order=3))
    """

    def __init__(self, order: int = 3, variable: str = "t", lower_order_final: Any = False, published: bool | str = False):
        rules = {(False, variable): "exact", (True, "t"): "riemann", (True, "rho"): "riemann", ("ipndm_v", "rho"): "bracket"}
        if (published, variable) not in rules:
            raise ValueError(f"published={published!r} is not known for variable={variable!r}: use True for 't' and 'rho', 'ipndm_v' for 'rho'.")
        rule = rules[published, variable]
        self._set(order, 3 if rule == "bracket" else 4, Splitting(np.inf), variable, rule, lower_order_final)


class DPMSolver(_Multistep):
    """DPM-Solver(1, 2M, 3M): Adams-Bashforth on eps in the noise splitting (sigma_data infinite), in lam; one evaluation a step.

    Measured order: 1.0, 2.0, 3.0; the published 3M 2.0.

    Args:
        order: 1 to 3.
        solver_type: "midpoint", the published second-order steps (also in the warm-up of order 3), or "heun", the exact integral.
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`.
        published: order 3 with half of the second derivative, as in all published codes; that is of order 2.
    Raises:
        ValueError: for another order or solver_type.
    Reference: Lu et al., DPM-Solver (2022); the multistep form is of DPM-Solver++ (2022).

        aj.sample(term, x_T, args, grid=ts, solver=aj.DPMSolver(order=2))
    """

    def __init__(self, order: int = 2, solver_type: str = "midpoint", lower_order_final: Any = False, published: bool = False):
        self._set(order, 3, Splitting(np.inf), "lam", _rule(solver_type, published), lower_order_final)


class DPMSolverPP(_Multistep):
    """DPM-Solver++(1, 2M, 3M): Adams-Bashforth on x0 in the data splitting (sigma_data = 0), in lam; one evaluation a step.

    Order 2 is the published midpoint rule, bit for bit in exact arithmetic; order 3 has the factor 2 in the second difference that all published
    codes lack. Measured order: 1.0, 2.0, 3.0; the published 3M 2.0.

    Args:
        order: 1 to 3.
        solver_type: "midpoint", the published second-order steps (also in the warm-up of order 3), or "heun", the exact integral.
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`.
        published: order 3 with half of the second derivative, as in all published codes.
    Raises:
        ValueError: for another order or solver_type.
    Reference: Lu et al., DPM-Solver++ (2022), DPM-Solver++(2M).

        aj.sample(term, x_T, args, grid=ts)      # the default solver, of order 2
    """

    def __init__(self, order: int = 2, solver_type: str = "midpoint", lower_order_final: Any = False, published: bool = False):
        self._set(order, 3, Splitting(0.0), "lam", _rule(solver_type, published), lower_order_final)


class SDEDPMSolver(_Multistep):
    """SDE-DPM-Solver(1, 2M): Adams-Bashforth on eps for the reverse SDE in the noise splitting; one evaluation and one draw a step.

    Order 1 is SEEDS-1. Arguments as `SDEDPMSolverPP`.

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.SDEDPMSolver(order=2), key=key)
    """

    def __init__(self, order: int = 2, tau: float = 1.0, solver_type: str = "midpoint", lower_order_final: Any = False, published: bool = False):
        self._set(order, 3, Splitting(np.inf, tau), "lam", _rule(solver_type, published), lower_order_final)


class SDEDPMSolverPP(_Multistep):
    """SDE-DPM-Solver++(1, 2M, 3M): Adams-Bashforth on x0 for the reverse SDE in the data splitting; one evaluation and one draw a step.

    tau = 0 is DPM-Solver++, tau^2 is k-diffusion's eta. Order 1 with tau = 1 is DDIM(eta=1), ancestral DDPM. The order is that of the
    drift; the strong order is 1.

    Args:
        order: 1 to 3.
        tau: stochasticity, at least 0.
        solver_type, lower_order_final: as `DPMSolverPP`.
        published: order 3 as k-diffusion has it, with half of the second derivative; "diffusers", as that has it for "midpoint", with a wrong
            sign too: third-order steps then have an error of first order.
    Raises:
        ValueError: for another order, tau, solver_type or `published`.
    Reference: Lu et al., DPM-Solver++ (2022), SDE-DPM-Solver++; k-diffusion's `dpmpp_2m_sde`, `dpmpp_3m_sde`.

        aj.sample(term, x_T, args, grid=ts, solver=aj.SDEDPMSolverPP(order=2), key=key)
    """

    def __init__(
        self,
        order: int = 2,
        tau: float = 1.0,
        solver_type: str = "midpoint",
        lower_order_final: Any = False,
        published: bool | str = False,
    ):
        rule = _rule(solver_type, bool(published))
        if published == "diffusers" and rule == "halved":
            rule = "sign"
        elif published not in (False, True):
            raise ValueError(f"published={published!r} is not known for solver_type={solver_type!r}: use True, or 'diffusers' for 'midpoint'.")
        self._set(order, 3, Splitting(0.0, tau), "lam", rule, lower_order_final)


class IPNDM(_Multistep):
    """DDIM's step with eps replaced by Adams-Bashforth's combination for even steps: iPNDM; one evaluation a step.

    Order 2 whatever `order` above 1 (measured 2.0 on steps even in lam), and 1 on uneven grids: the coefficients know nothing of the grid.
    `DEIS` has those that do.

    Args:
        order: 1 to 4.
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`.
    Raises:
        ValueError: for another order.
    Reference: Liu et al., PNDM (2022); Zhang & Chen, DEIS (ICLR 2023), iPNDM.

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.IPNDM())
    """

    def __init__(self, order: int = 4, lower_order_final: Any = False):
        self._set(order, 4, Splitting(np.inf), "lam", "constant", lower_order_final)


class Exponential(_Multistep):
    """Adams-Bashforth in the splitting of any assumed standard deviation of the data; one evaluation a step.

    Exact in one step for data N(0, sigma_data^2). sigma_data = 1 on a variance-preserving process integrates v against the angle. Order 1 to 4,
    measured in all four variables; order 4 in lam 3.8 from 160 to 320 steps, since the warm-up begins to show.

    Args:
        order: 1 to 4.
        sigma_data: 0, a positive number, infinity, or an array of positive numbers that broadcasts against the trailing axes of x.
        variable: the variable of the polynomial: "lam", "rho", "t" or "theta" (the angle; a finite number only).
        tau: stochasticity, at least 0; above 0 one draw a step.
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`.
    Raises:
        ValueError: for another order, sigma_data, tau or variable.
    Reference: equations (1), (4) of `adjoint_jax.splitting`.

        aj.sample(term, x_T, args, grid=ts, solver=aj.Exponential(order=3, sigma_data=0.5))
    """

    def __init__(self, order: int = 2, sigma_data: Any = 1.0, variable: str = "lam", tau: float = 0.0, lower_order_final: Any = False):
        self._set(order, 4, Splitting(sigma_data, tau), variable, "exact", lower_order_final)


def _rule(solver_type: str, published: bool) -> str:
    """The rule of `multistep` for the published names."""
    rules = {"midpoint": ("midpoint", "halved"), "heun": ("exact", "half")}
    if solver_type not in rules:
        raise ValueError(f"solver_type={solver_type!r} is not known: use 'midpoint' or 'heun'.")
    return rules[solver_type][published]
