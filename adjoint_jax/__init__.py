"""Gradients of any differentiable loss on a diffusion or flow sampler's output, in JAX, in memory that does not grow with the number of steps."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any

from . import adjoints as adjoints, grids as grids, networks as networks, solvers as solvers
from .adjoints import (
    AdjointDEIS as AdjointDEIS,
    AdjointDPM as AdjointDPM,
    DirectAdjoint as DirectAdjoint,
    DiscreteAdjoint as DiscreteAdjoint,
    LastK as LastK,
    PerStep as PerStep,
    ReversibleAdjoint as ReversibleAdjoint,
)
from .audit import audit as audit
from .networks import cfg as cfg, equinox as equinox, linen as linen, nnx as nnx
from .plan import plan as plan
from .processes import (
    EDM as EDM,
    VE as VE,
    FlowMatching as FlowMatching,
    VPCosine as VPCosine,
    VPDiscrete as VPDiscrete,
    VPLinear as VPLinear,
)
from .sample import Trajectory as Trajectory, invert as invert, sample as sample
from .schedulers import from_scheduler_config as from_scheduler_config
from .search import search_schedule as search_schedule
from .solvers import (
    BDIA as BDIA,
    DDIM as DDIM,
    DEIS as DEIS,
    DPMSolver as DPMSolver,
    DPMSolverPP as DPMSolverPP,
    EDMHeun as EDMHeun,
    Exponential as Exponential,
    ExponentialRK as ExponentialRK,
    Paired as Paired,
    Rex as Rex,
    Schedule as Schedule,
    SDEDPMSolverPP as SDEDPMSolverPP,
    UniPC as UniPC,
)
from .splitting import Splitting as Splitting
from .terms import DiffusionTerm as DiffusionTerm, sde_terms as sde_terms

if _TYPE_CHECKING:
    from . import models as models
    from .checkpoints import load as load


def __getattr__(name: str) -> _Any:
    """`models` and `load` bring Flax with them, so they are imported when first used."""
    if name == "models":
        return _import_module(".models", __name__)
    if name == "load":
        return _import_module(".checkpoints", __name__).load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
