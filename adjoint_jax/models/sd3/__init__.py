"""SD3Transformer: image and text tokens in one attention, each with weights of its own."""

from ._model import SD3Transformer as SD3Transformer
