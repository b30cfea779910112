"""Networks: what they predict, adapters for modules, guidance, and wrappers for the edges of the data and of the time."""

from ._modules import edm_precondition as edm_precondition, equinox as equinox, linen as linen, nnx as nnx
from ._predictions import PREDICTIONS as PREDICTIONS, Linear as Linear, conversions as conversions, target as target
from ._wrapping import as_pytree as as_pytree, predict as predict
from .edges import clip as clip, threshold as threshold
from .guidance import cfg as cfg, classifier_guidance as classifier_guidance
from .times import rounded_times as rounded_times, time_sharing as time_sharing
