"""Solvers: diffrax solvers whose weights come from a table in one change of variables."""

from ._base import AbstractSampler as AbstractSampler
from .adaptive import AdaptiveGrid as AdaptiveGrid, StepController as StepController, adaptive_grid as adaptive_grid
from .ancestral import Ancestral as Ancestral, Churn as Churn, DPMSolverPPSDE as DPMSolverPPSDE, EDMHeun as EDMHeun
from .cycle import encode_noise as encode_noise
from .ddim import DDIM as DDIM
from .dynamic import DCSolver as DCSolver
from .edict import EDICT as EDICT
from .gddim import GDDIM as GDDIM
from .gms import GMS as GMS, x0_variance as x0_variance
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
from .plain import PlainRK as PlainRK
from .pndm import FON as FON, PNDM as PNDM
from .predictor import SASolver as SASolver, UniPC as UniPC
from .prescribed import Prescribed as Prescribed
from .reflected import Reflected as Reflected
from .rex import Rex as Rex
from .schedule import Schedule as Schedule, Scheduled as Scheduled
from .singlestep import ExponentialRK as ExponentialRK
from .stages import ExponentialStages as ExponentialStages
from .statistics import ModelStatistics as ModelStatistics, estimate_statistics as estimate_statistics
from .twostep import BDIA as BDIA, BELM as BELM
from .v3 import DPMSolverV3 as DPMSolverV3
