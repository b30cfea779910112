"""DiT: a transformer over the patches of a latent, with adaptive norms."""

from ._model import DiT as DiT
