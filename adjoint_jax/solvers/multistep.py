"""Exponential multistep methods: one class, told apart by a splitting, a variable, an order and a rule.

With z and F of the splitting (`adjoint_jax.splitting`), integrate the polynomial through the last outputs exactly:

    x_{i+1} = (m_{i+1}/m_i) x_i + sum_{j<k} W_j F_{i-j} + s_i z_i,      W_j = m_{i+1} int_{u_i}^{u_{i+1}} l_j(w(u)) du,  (1)
    F_i = A_i x_i + B_i p_i                                   (the prediction p of any kind is linear in (x, F))      (2)

with l_j the Lagrange basis in the variable w = lam, rho, t or theta, and s_i z_i the noise of a stochastic splitting. c infinite: w = t is
tAB-DEIS, w = rho is rhoAB-DEIS, w = lam is diffusers' DEIS and DPM-Solver; c = 0: w = lam is DPM-Solver++. Published rules differ:

    "midpoint"   second-order steps have W_1 = -(h_i / (2 h_{i-1})) sum_j W_j: DPM-Solver(++)-2M, UniPC's bh2         (3)
    "bh1"        second-order steps have W_1 = -(h_i / (2 h_{i-1})) h_i m_{i+1} du/dlam: UniPC's bh1                  (4)
    "halved"     "midpoint", and third-order steps with half of the second derivative: DPM-Solver(++)-3M as published (5)
    "half"       (5) with exact second-order steps
    "sign"       "halved" for c = 0 and, in third-order steps, the wrong sign of 1/2 in the second derivative's weight:
                 - alpha_{i+1} h_i^2 F[lam_i, lam_{i-1}, lam_{i-2}], diffusers' SDE-DPM-Solver++(3M)
    "bracket"    third-order steps in w = rho with (h^2 + h h' - h' (h' + h'')) sum_j W_j / 2 too little of F[rho_i, rho_{i-1}, rho_{i-2}],
                 h, h', h'' the last steps in rho, by a misplaced bracket: diff-sampler's iPNDM_v                       (6)
    "constant"   W_j = b_j sum_j W_j with the Adams-Bashforth coefficients b of even steps: iPNDM                      (7)
    "riemann"    W_j by the left Riemann sum of 10 000 terms in w = t or rho, W_0 too: DEIS as published                (8)

Order: k, where F varies little in the first steps (it does from noise with lam <= -4). Step i < k has order i + 1 only, which caps the
global order at 2 elsewhere. A step into sigma = 0 or out of alpha = 0 has infinite length in lam and is of first order, but for w = rho
and c infinite, which reach sigma = 0 in full order (k-diffusion's LMS).
"""

from typing import Any

import equinox as eqx
import numpy as np

from .._numerics import broadcasting, namespace
from ..processes import AbstractProcess
from ..splitting import Splitting, level
from .linear import AbstractLinear, Pattern, Row, past_outputs
from .step import VARIABLES, Step, output, weights


class AbstractMultistep(AbstractLinear):
    """Equations (1)-(8) with k = `steps_back`."""

    steps_back: eqx.AbstractVar[int]
    splitting: eqx.AbstractVar[Splitting]
    variable: eqx.AbstractVar[str]
    rule: eqx.AbstractVar[str]
    lower_order_final: eqx.AbstractVar[Any]

    def order(self, terms: Any) -> int:
        return self.steps_back

    @property
    def tau(self) -> float | None:
        return self.splitting.tau

    @property
    def window(self) -> int:
        return self.steps_back

    @property
    def pattern(self) -> Pattern:
        past = past_outputs(self.steps_back - 1)
        noise = ("z0",) if self.splitting.stochastic else ()
        return Pattern(reads=("x",), x=("x", "F0", *past, *noise), registers=past, draws=len(noise))

    def use(self, valid: Any, steps: int) -> Any:
        return valid & (np.arange(self.window) < orders(steps, self.steps_back, self.lower_order_final)[:, None])

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, splitting, c = namespace(nodes), self.splitting, self.splitting.ndim
        start, end = level(process, nodes[..., 0]), level(process, t_end)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = splitting.scale(end) / splitting.scale(start)
            step = Step.of(splitting, self.variable, process, end, nodes, valid)
            parts = [xp.expand_dims(ratio, -1 - c), weights(step, splitting.step(start, end), self.rule)]
            if splitting.stochastic:
                parts.append(xp.expand_dims(splitting.noise(start, end), -1 - c))
            of_x, of_p = (xp.expand_dims(part, -1 - c) for part in output(splitting, prediction, start))
        shift = dict.fromkeys(self.pattern.registers)
        return Row(nodes[..., :1], of_x, of_p, (None,), xp.concatenate(parts, axis=-1 - c), shift)


def orders(steps: int, order: int, lower_order_final: Any) -> np.ndarray:
    """The order of each step, `[steps]`, before warm-up: `order`, or less in the last steps.

    `lower_order_final`: False, never; True, min(order, steps left); a number n, so on grids of fewer than n steps; "euler", the last
    step alone; or the orders themselves, one a step.
    """
    left = np.arange(steps, 0, -1)
    if isinstance(lower_order_final, tuple):
        if len(lower_order_final) != steps:
            raise ValueError(f"One order a step: got {len(lower_order_final)} orders for {steps} steps.")
        return np.minimum(order, lower_order_final)
    if lower_order_final == "euler":
        return np.where(left == 1, 1, order)
    lower = lower_order_final if isinstance(lower_order_final, bool) else steps < lower_order_final
    return np.minimum(order, left) if lower else np.full(steps, order)


def checked_order(order: int, most: int, name: str) -> int:
    if order not in range(1, most + 1):
        raise ValueError(f"{name} has orders 1 to {most}; got order={order!r}.")
    return int(order)


def checked_variable(variable: str, splitting: Splitting) -> str:
    if variable not in VARIABLES:
        raise ValueError(f"variable={variable!r} is not known: use one of {', '.join(VARIABLES)}.")
    if variable == "theta" and (splitting.kind != "finite" or splitting.ndim):
        raise ValueError("variable='theta' is the angle of one finite sigma_data: use 'rho' or 'lam' with 0, infinity or an array.")
    return variable
