"""Networks whose answer is not yet a prediction in the shape of x."""

from typing import Any

import equinox as eqx

from ..networks import as_pytree


class FirstChannels(eqx.Module):
    """A network whose answer holds the prediction in its first channels and a learned variance after it."""

    network: Any = eqx.field(converter=as_pytree)
    channels: int = eqx.field(static=True)

    def __call__(self, x, t, args):
        return self.network(x, t, args)[..., : self.channels]
