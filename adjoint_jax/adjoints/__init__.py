"""Adjoints: how a sample is differentiated. None of them changes its value."""

from diffrax import DirectAdjoint as DirectAdjoint

from ._base import AbstractSamplerAdjoint as AbstractSamplerAdjoint
from ._computation import PerStep as PerStep
from ._interpolation import Fitted as Fitted
from .deis import AdjointDEIS as AdjointDEIS
from .discrete import DiscreteAdjoint as DiscreteAdjoint
from .dpm import AdjointDPM as AdjointDPM
from .drift import drift as drift, segments_needed as segments_needed
from .fitted import fit_interpolation as fit_interpolation
from .greedy import look_ahead as look_ahead, posterior_gradient as posterior_gradient
from .health import adjoint_norms as adjoint_norms, find_nonfinite as find_nonfinite
from .interpolated import InterpolatedAdjoint as InterpolatedAdjoint
from .reversible import ReversibleAdjoint as ReversibleAdjoint
from .truncated import LastK as LastK, LowVariance as LowVariance, RandomK as RandomK
