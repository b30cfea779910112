"""Solvers: diffrax solvers whose weights come from a table in one change of variables."""

from ._base import AbstractSampler as AbstractSampler
from .multistep import AbstractMultistep as AbstractMultistep
from .named import DDIM as DDIM, DEIS as DEIS, DPMSolverPP as DPMSolverPP, Exponential as Exponential
from .singlestep import ExponentialRK as ExponentialRK
