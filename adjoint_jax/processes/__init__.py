"""Noise processes, alpha(t) and sigma(t)."""

from ._base import AbstractProcess as AbstractProcess
from .exploding import EDM as EDM, VE as VE
from .flow import FlowMatching as FlowMatching
from .preserving import VPCosine as VPCosine, VPDiscrete as VPDiscrete, VPLinear as VPLinear, zero_terminal_snr as zero_terminal_snr
