"""Rex: any explicit exponential Runge-Kutta method, coupled with its own backward step so that the pair is a bijection.

With k the scale m of a splitting and Psi_h(X) the sum over stages of a step of length h in u from X (`adjoint_jax.solvers.singlestep`,
equation (1): the step is (k_1/k_0) X + k_1 Psi_h(X)), from u_0 to u_1 = u_0 + h,

    X_1  = (k_1/k_0) (zeta X_0 + (1 - zeta) Y_0) + k_1 Psi_h(u_0, Y_0)                                             (1)
    Y_1  = (k_1/k_0) Y_0 - k_1 Psi_{-h}(u_1, X_1)                                                               (2)

and, solved backwards,

    Y_0  = (k_0/k_1) Y_1 + k_0 Psi_{-h}(u_1, X_1)                                                               (3)
    X_0  = (k_0/k_1) X_1 / zeta + (1 - 1/zeta) Y_0 - (k_0/zeta) Psi_h(u_0, Y_0).                                   (4)

With tau, X/m_kappa obeys dZ = F du + dN, du standing for kappa (m/alpha)^(-tau^2) du and N for its additive noise. Both steps see one path N:
it is drawn at the fractions c_j and 1 - c_j of the step at which a stage of either stands, as independent increments n_1 .. n_K,

    stage of Psi_h at the fraction c:  + k_c sum_{c_j <= c} n_j,    of Psi_{-h}:  - k_c sum_{c_j > c} n_j,    n_j = s_j z_j / k_j,       (5)

s_j of equation (5) of `adjoint_jax.splitting` for the piece of the step; the ends carry + k_1 sum n_j in (1) and (2), - k_0 sum n_j in (3).
"""

from itertools import pairwise
from typing import Any

import diffrax
import equinox as eqx
import numpy as np

from .._numerics import broadcasting, namespace
from ..processes import AbstractProcess
from ..splitting import Splitting, level
from .linear import Pattern, Row
from .paired import AbstractInvertible
from .singlestep import rows as exponential_rows, stage_time, tableau_of


class Rex(AbstractInvertible):
    """Equations (1), (2), the McCallum-Foster coupling of an explicit Runge-Kutta solver: the solver's order, twice its evaluations.

    The inverse divides by zeta once a step. The coupling is weakly stable: with Euler in data form the two chains part on fine grids (its
    error grows again from 160 to 320 steps); midpoint and better have their order there.

    With tau above 0 this is the SDE form, of one draw a step for Euler and Heun and two for the midpoint rule: `aj.invert` needs the key or
    the noise of the sample. Undoing it multiplies rounding errors by m_0/m_1 and more over the way (m = sigma (sigma/alpha)^(tau^2) in data
    form), so that float32 serves short segments between stored states only. Round trips with Heun, a Gaussian mixture on VPLinear, steps
    even in lam, |x_T - x| / |x| and m_0/m_1 (the noise form at tau = 1: 6e-9 and 1 over the whole range, 2e-15 and 5e-7 over the second):

        t           steps   tau = 0                      0.3                          1
                            float64   float32   ratio    float64   float32   ratio    float64   float32   ratio
        1 to 1e-3   50      2e-12     1e-3      95       6e-12     3e-3      230      3e-7      600       1.4e6
        0.6 to 0.3  20      2e-15     4e-7      1.3      3e-15     4e-7      1.5      4e-15     1e-6      6.3
        0.6 to 0.5  10      1e-15     2e-7      1.0      1e-15     3e-7      1.1      1e-15     4e-7      1.8

    Args:
        solver: `diffrax.Euler()`, `diffrax.Midpoint()`, `diffrax.Dopri5()` or any other explicit Runge-Kutta solver.
        zeta: coupling of the two chains, above 0 and at most 1.
        sigma_data: 0 (data form, on x0), infinity (noise form, on eps), a positive number, or an array that broadcasts against the
            trailing axes of x. A step into sigma = 0 can be undone for sigma_data > 0 only.
        tau: stochasticity, at least 0; above 0 for sigma_data 0 or infinity.
    Raises:
        TypeError: for a solver without an explicit tableau.
        ValueError: for another zeta or sigma_data, or a tau that does not go with it.
    Reference: Blasingame & Liu, Rex: a family of reversible exponential (stochastic) Runge-Kutta solvers (2025); McCallum & Foster,
        Efficient, accurate and stable gradients for neural ODEs (2024).

        pair = aj.invert(term, x_0, args, grid=ts, solver=aj.Rex(diffrax.Midpoint()))
        aj.sample(term, pair, args, grid=ts, solver=aj.Rex(diffrax.Midpoint())).x      # x_0
    """

    solver: diffrax.AbstractSolver
    zeta: float = eqx.field(static=True)
    splitting: Splitting

    def __init__(self, solver: Any = None, zeta: float = 0.999, sigma_data: Any = 0.0, tau: float = 0.0):
        if not 0 < zeta <= 1:
            raise ValueError(f"Rex's zeta is above 0 and at most 1; got {zeta!r}.")
        self.solver, self.zeta, self.splitting = diffrax.Midpoint() if solver is None else solver, float(zeta), Splitting(sigma_data, tau)
        if self.splitting.stochastic and (self.splitting.kind == "finite" or np.ndim(tau)):
            raise ValueError("Rex's tau is one number, and above 0 for sigma_data 0 or infinity only.")
        tableau_of(self.solver)

    def order(self, terms: Any) -> int | None:
        return self.solver.order(terms)

    @property
    def pattern(self) -> Pattern:
        return self._pattern("aux", "x")

    @property
    def inverse_pattern(self) -> Pattern:
        return self._pattern("x", "aux")

    @property
    def _fractions(self) -> list[float]:
        """Where the path of (5) is drawn: none without noise."""
        c = tableau_of(self.solver).c
        return [float(each) for each in np.unique(np.round([*c, *(1 - c), 1.0], 12)) if each > 0] if self.splitting.stochastic else []

    def _pattern(self, one: str, two: str) -> Pattern:
        """Stages 0 .. S-1 step from `one`, which gives the new `two`; the rest from that, which gives the new `one`."""
        s = len(tableau_of(self.solver).b)
        stages = [f"F{j}" for j in range(2 * s)]
        noise = [f"z{j}" for j in range(len(self._fractions))]
        first = [one, *((one, *noise, *stages[:j]) for j in range(1, s))]
        further = [(two, one, *noise, *stages[: s + j]) for j in range(s)]
        new_two, new_one = (two, one, *noise, *stages[:s]), (two, one, *noise, *stages)
        x, aux = (new_two, new_one) if two == "x" else (new_one, new_two)
        return Pattern((*first, *further), x, {"aux": aux}, copies=("aux",), draws=len(noise))

    def use(self, valid: Any, steps: int) -> Any:
        return valid

    def inverse_use(self, valid: Any, steps: int) -> Any:
        return valid

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        ahead, back = self._steps(process, prediction, nodes[..., 0], t_end)
        ratio, *ahead_sum = self._parts(ahead)
        _, *back_sum = self._parts(back)
        path = self._path(process, nodes[..., 0], t_end)
        noise = [self.splitting.scale(level(process, t_end)) * n for n in path]
        x = [self.zeta * ratio, (1 - self.zeta) * ratio, *noise, *ahead_sum]  # (1)
        aux = [0 * ratio, ratio, *noise, *[0 * part for part in ahead_sum], *[-ratio * part for part in back_sum]]  # (2)
        return self._row(process, (ahead, back), path, x, x, aux)

    @broadcasting
    def inverse_rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        ahead, back = self._steps(process, prediction, t_end, nodes[..., 0])
        ratio, *ahead_sum = self._parts(ahead)
        _, *back_sum = self._parts(back)
        path = self._path(process, t_end, nodes[..., 0])
        with np.errstate(divide="ignore", invalid="ignore"):
            grown, noise = 1 / ratio, [self.splitting.scale(level(process, t_end)) * n for n in path]
            aux = [grown, 0 * ratio, *[-n for n in noise], *back_sum]  # (3), of (aux, x, z..., F...)
            x = [(1 - 1 / self.zeta) * part for part in aux]
            x[1] = x[1] + grown / self.zeta
            x[2 : 2 + len(noise)] = [part - n / self.zeta for part, n in zip(x[2:], noise, strict=False)]
            x = x + [-grown / self.zeta * part for part in ahead_sum]  # (4)
            return self._row(process, (back, ahead), path, aux, x, aux)

    def _steps(self, process: AbstractProcess, prediction: str, t0: Any, t1: Any) -> tuple[Row, Row]:
        """The steps of the solver from t0 to t1 and back."""
        tableau = tableau_of(self.solver)
        step = lambda *ends: exponential_rows(self.splitting, tableau, process, prediction, *ends)  # noqa: E731
        return step(t0, t1), step(t1, t0)

    def _path(self, process: AbstractProcess, t0: Any, t1: Any) -> list[Any]:
        """s_j / k_j of (5)."""
        start, end = level(process, t0), level(process, t1)
        with np.errstate(divide="ignore", invalid="ignore"):
            times = [stage_time(self.splitting, process, start, end, t0, t1, c) for c in self._fractions]
            at = [start, *(level(process, t) for t in times)]
            return [self.splitting.noise(*ends) / self.splitting.scale(ends[1]) for ends in pairwise(at)]

    def _seen(self, process: AbstractProcess, row: Row, path: list[Any], stage: int, ahead: bool) -> list[Any]:
        """What a stage of either step sees of the path, (5)."""
        c = tableau_of(self.solver).c[stage]
        if not path:
            return []
        k = self.splitting.scale(level(process, row.times[..., stage]))
        if ahead:
            return [k * n * float(at <= c + 1e-9) for n, at in zip(path, self._fractions, strict=True)]
        return [-k * n * float(at > 1 - c + 1e-9) for n, at in zip(path, self._fractions, strict=True)]

    def _parts(self, row: Row) -> list[Any]:
        """The weights of x and of the stages at the end of a step."""
        c = self.splitting.ndim
        return [row.x[(..., k, *(slice(None),) * c)] for k in range(row.x.shape[-1 - c])]

    def _row(self, process: AbstractProcess, steps: tuple[Row, Row], path: list[Any], start: list[Any], x: list[Any], aux: list[Any]) -> Row:
        """`start`: the weights of the state from which the second step goes; `steps` are ahead and back, or back and ahead where `start` is aux."""
        first, second = steps
        xp, c = namespace(first.x), self.splitting.ndim
        tail, ahead, noise = -1 - c, start is x, len(path)
        split = lambda weights: [weights[(..., k, *(slice(None),) * c)] for k in range(weights.shape[tail])]  # noqa: E731
        reads = [first.reads[0]]
        for stage, weights in enumerate(first.reads[1:], 1):
            of_start, *of_stages = split(weights)
            reads.append(xp.stack([of_start, *self._seen(process, first, path, stage, ahead), *of_stages], axis=tail))
        reads.append(xp.stack(start, axis=tail))
        for stage, weights in enumerate(second.reads[1:], 1):
            of_start, *of_stages = split(weights)
            found = [of_start * part for part in start]
            seen = self._seen(process, second, path, stage, not ahead)
            found[2 : 2 + noise] = [part + n for part, n in zip(found[2:], seen, strict=False)]
            reads.append(xp.stack([*found, *of_stages], axis=tail))
        return Row(
            times=xp.concatenate([first.times, second.times], axis=-1),
            of_x=xp.concatenate([first.of_x, second.of_x], axis=tail),
            of_p=xp.concatenate([first.of_p, second.of_p], axis=tail),
            reads=tuple(reads),
            x=xp.stack(x, axis=tail),
            registers={"aux": xp.stack(aux, axis=tail)},
            active=xp.concatenate([first.active, second.active], axis=-1),
        )
