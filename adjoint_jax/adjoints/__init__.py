"""Adjoints: how a sample is differentiated. None of them changes its value."""

from diffrax import DirectAdjoint as DirectAdjoint

from ._base import AbstractSamplerAdjoint as AbstractSamplerAdjoint
from ._computation import PerStep as PerStep
from .deis import AdjointDEIS as AdjointDEIS
from .discrete import DiscreteAdjoint as DiscreteAdjoint
from .health import adjoint_norms as adjoint_norms, find_nonfinite as find_nonfinite
