"""Solvers: diffrax solvers whose weights come from a table in one change of variables."""

from ._base import AbstractSampler as AbstractSampler
from .ancestral import Ancestral as Ancestral, Churn as Churn, DPMSolverPPSDE as DPMSolverPPSDE
from .cycle import encode_noise as encode_noise
from .ddim import DDIM as DDIM
from .edict import EDICT as EDICT
from .linear import AbstractLinear as AbstractLinear
from .multistep import AbstractMultistep as AbstractMultistep
from .named import (
    DEIS as DEIS,
    IPNDM as IPNDM,
    DPMSolver as DPMSolver,
    DPMSolverPP as DPMSolverPP,
    Exponential as Exponential,
    SDEDPMSolver as SDEDPMSolver,
    SDEDPMSolverPP as SDEDPMSolverPP,
)
from .paired import AbstractPaired as AbstractPaired, Paired as Paired
from .predictor import SASolver as SASolver, UniPC as UniPC
from .reflected import Reflected as Reflected
from .rex import Rex as Rex
from .singlestep import ExponentialRK as ExponentialRK
from .stages import ExponentialStages as ExponentialStages
from .twostep import BDIA as BDIA, BELM as BELM
