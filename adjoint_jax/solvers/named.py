"""The published multistep samplers, as rows of one table: (sigma_data, variable, order, midpoint rule)."""

from typing import Any

import equinox as eqx
import numpy as np

from ..splitting import Splitting
from .multistep import AbstractMultistep, checked_order, checked_variable


class DDIM(AbstractMultistep):
    """x_1 = (alpha_1/alpha_0) x_0 + (sigma_1 - alpha_1 sigma_0/alpha_0) eps: order 1, one network evaluation a step.

    Args:
        eta: 0, the deterministic sampler. The stochastic ones are not part of this version.
    Raises:
        ValueError: for another eta.
    Reference: Song, Meng & Ermon, Denoising diffusion implicit models (2021), eq. (12) with sigma_t = 0.

        aj.sample(term, x_T, args, grid=ts, solver=aj.DDIM())
    """

    splitting: Splitting
    variable: str = eqx.field(static=True)
    steps_back: int = eqx.field(static=True)
    midpoint: bool = eqx.field(static=True)
    eta: float = eqx.field(static=True)

    def __init__(self, eta: float = 0.0):
        if eta != 0:
            raise ValueError(f"DDIM(eta={eta}) draws noise, which this version does not: use eta=0.")
        self.eta = float(eta)
        self.splitting, self.variable, self.steps_back, self.midpoint = Splitting(np.inf), "lam", 1, False


class DEIS(AbstractMultistep):
    """Adams-Bashforth on eps in the noise splitting (sigma_data infinite), the polynomial in t, rho or lam; one evaluation a step.

    Args:
        order: 1 to 4; order k is tAB-(k-1) of the paper and diffusers' order k.
        variable: "t" (tAB-DEIS), "rho" (rhoAB-DEIS) or "lam" (diffusers' log-rho).
    Raises:
        ValueError: for another order or variable.
    Reference: Zhang & Chen, DEIS (ICLR 2023), tAB- and rhoAB-DEIS; its weights by exact integrals.

        aj.sample(term, x_T, args, grid=ts, solver=aj.DEIS(order=3))
    """

    splitting: Splitting
    variable: str = eqx.field(static=True)
    steps_back: int = eqx.field(static=True)
    midpoint: bool = eqx.field(static=True)

    def __init__(self, order: int = 3, variable: str = "t"):
        self.splitting, self.midpoint = Splitting(np.inf), False
        self.steps_back = checked_order(order, 4, "DEIS")
        self.variable = checked_variable(variable, self.splitting)


class DPMSolverPP(AbstractMultistep):
    """DPM-Solver++(1, 2M, 3M): Adams-Bashforth on x0 in the data splitting (sigma_data = 0), in lam; one evaluation a step.

    Order 2 is the published midpoint rule, bit for bit in exact arithmetic; order 3 has the factor 2 in the second difference that all published
    codes lack (they measure order 2).

    Args:
        order: 1 to 3.
    Raises:
        ValueError: for another order.
    Reference: Lu et al., DPM-Solver++ (2022), DPM-Solver++(2M).

        aj.sample(term, x_T, args, grid=ts)      # the default solver, of order 2
    """

    splitting: Splitting
    variable: str = eqx.field(static=True)
    steps_back: int = eqx.field(static=True)
    midpoint: bool = eqx.field(static=True)

    def __init__(self, order: int = 2):
        self.splitting, self.variable, self.midpoint = Splitting(0.0), "lam", True
        self.steps_back = checked_order(order, 3, "DPMSolverPP")


class Exponential(AbstractMultistep):
    """Adams-Bashforth in the splitting of any assumed standard deviation of the data; one evaluation a step.

    Exact in one step for data N(0, sigma_data^2). sigma_data = 1 on a variance-preserving process integrates v against the angle.

    Args:
        order: 1 to 4.
        sigma_data: 0, a positive number, infinity, or an array of positive numbers that broadcasts against the trailing axes of x.
        variable: the variable of the polynomial: "lam", "rho", "t" or "theta" (the angle; a finite number only).
    Raises:
        ValueError: for another order, sigma_data or variable.
    Reference: equation (1) of `adjoint_jax.splitting`.

        aj.sample(term, x_T, args, grid=ts, solver=aj.Exponential(order=3, sigma_data=0.5))
    """

    splitting: Splitting
    variable: str = eqx.field(static=True)
    steps_back: int = eqx.field(static=True)
    midpoint: bool = eqx.field(static=True)

    def __init__(self, order: int = 2, sigma_data: Any = 1.0, variable: str = "lam"):
        self.splitting, self.midpoint = Splitting(sigma_data), False
        self.steps_back = checked_order(order, 4, "Exponential")
        self.variable = checked_variable(variable, self.splitting)
