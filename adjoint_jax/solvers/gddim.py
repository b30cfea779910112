"""gDDIM on isotropic processes: what it is in the family of `adjoint_jax.splitting`.

With dx = [F x - (1 + l^2)/2 g^2 score] dt + l g dw, the transition Psi of F, Psi_hat of F + (1 + l^2)/2 g^2 / sigma^2, and
score = -eps/R, R = sigma, gDDIM's step s -> t is a draw from

    N(Psi x_s + (Psi_hat - Psi) R_s eps,  P),      dP = (2 (F + (1 + l^2)/2 g^2/sigma^2) P - l^2 g^2) dt,  P_s = 0,          (1)

which is exact where the data are a point. With F = alpha'/alpha and g^2/sigma^2 = -2 lam',

    Psi = alpha_t/alpha_s,    Psi_hat = (alpha_t/alpha_s) e^(-(1 + l^2) h) = (sigma_t/sigma_s) e^(-l^2 h),    h = lam_t - lam_s,
    P = sigma_t^2 (1 - e^(-2 l^2 h)),                                                                              (2)

and x_s = alpha_s x0 + sigma_s eps makes the mean Psi_hat x_s + (Psi - Psi_hat) alpha_s x0: Psi_hat is m_kappa,t / m_kappa,s of the data
splitting (c = 0) with tau = l, and (1) its step of order 1, with (5) there for P. At l = 0 there is no noise, and the paper's
multistep form, the polynomial through eps in t with transition Psi, is tAB-DEIS.
"""

import numpy as np

from ..splitting import Splitting
from .multistep import AbstractMultistep
from .named import DEIS, Exponential


def GDDIM(order: int = 1, l: float = 1.0) -> AbstractMultistep:  # noqa: E741
    """gDDIM for the processes of this library, all isotropic: `Exponential(order, 0.0, "t", tau=l)`, and `DEIS(order, "t")` where l = 0.

    Order 1 is published for every l: (1), which is SDE-DPM-Solver++(1) with tau = l, hence DDIM(eta=1) at l = 1; l = 0 is published for every
    order. For l > 0 and order > 1 this is the polynomial through x0 in t that (1) extends to. The authors' code takes there
    x0_j = (x_s - sigma_s eps_j)/alpha_s for past outputs eps_j too, with the state and the scales of the present time: not part of this version,
    since its drift has order 1 only. What gDDIM is for, CLD and blurring with their matrices F, G and R, needs processes that this library has not.

    Args:
        order: 1 to 4.
        l: stochasticity, at least 0; 0 is the ODE, 1 the reverse SDE; above 0 one draw a step.
    Raises:
        ValueError: for another order or l.
    Reference: Zhang, Tao & Chen, gDDIM: generalized denoising diffusion implicit models (ICLR 2023).

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.GDDIM(l=0.5), key=key)
    """
    return Exponential(order, 0.0, "t", tau=l) if Splitting(np.inf, l).stochastic else DEIS(order, "t")
