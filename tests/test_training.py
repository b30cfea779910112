"""The training loop of the examples: gone on after a kill as if there had been none, and under the same options alone."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import training

pytestmark = pytest.mark.usefixtures("as_the_program_runs")


@dataclass(frozen=True)
class Config:
    out: Path
    steps: int = 6
    batch: int = 4
    learning_rate: float = 0.1
    ema: float = 0.9
    save_every: int = 2
    seed: int = 0


def trained(config, stop=None):
    """A line fitted to y = 3 x - 1; killed before step `stop`."""
    x = np.linspace(-1, 1, 12, dtype=np.float32)

    def items(step):
        if step == stop:
            raise KeyboardInterrupt
        return jnp.asarray(x[training.batch_indices(config, step, len(x))])

    def loss(params, x, key):
        del key
        return jnp.mean((params["a"] * x + params["b"] - (3 * x - 1)) ** 2)

    return training.train(loss, {"a": jnp.zeros(()), "b": jnp.zeros(())}, items, config)


def test_a_killed_run_goes_on_to_the_same_bits_under_the_same_options(tmp_path):
    whole = trained(Config(tmp_path / "whole"))
    killed = Config(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        trained(killed, stop=5)
    with pytest.raises(ValueError, match=r"was started with other values: learning_rate = 0\.1 \(now 0\.2\); give the same to resume"):
        trained(replace(killed, learning_rate=0.2))
    assert trained(replace(killed, save_every=3)) == whole
    assert (killed.out / training.STATE).read_bytes() == (tmp_path / "whole" / training.STATE).read_bytes()
