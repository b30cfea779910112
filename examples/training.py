"""The training loop of the examples: Adam with warm-up and decay, an average of the weights, and a state that a killed run goes on from.

params <- Adam(clip(grad loss(params, batch_k, key_k))),   average <- ema average + (1 - ema) params,
batch_k and key_k depend on the seed and k alone, so that a resumed run sees what an unbroken one sees.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from tqdm import tqdm

from adjoint_jax.checkpoints._files import to_json
from adjoint_jax.experiments.run import CONFIG, same, write
from adjoint_jax.schedulers._betas import process_from_config

WARM_UP = 200
STATE = "state.msgpack"
ELSEWHERE = ("data", "out", "export", "save_every")
"""Options that do not change what a step does."""
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
}
PROCESS, PREDICTION = process_from_config(SCHEDULER)


class Config(Protocol):
    """What a training run is told."""

    @property
    def out(self) -> Path: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def ema(self) -> float: ...
    @property
    def save_every(self) -> int: ...
    @property
    def seed(self) -> int: ...


def batch_indices(config: Config, step: int, size: int) -> np.ndarray:
    """The items of one step: a walk through a permutation that depends on the seed and the epoch alone."""
    per_epoch = size // config.batch
    epoch, k = divmod(step, per_epoch)
    order = np.random.default_rng((config.seed, epoch)).permutation(size)
    return order[k * config.batch : (k + 1) * config.batch]


def stratified(key: Any, size: int) -> Any:
    """Uniform numbers `[size]` in [0, 1), one in each of `size` equal parts of the circle: times of a batch."""
    return (jax.random.uniform(key) + jnp.arange(size) / size) % 1


def train(loss: Callable, params: Any, items: Callable[[int], Any], config: Config) -> Any:
    """The averaged weights after `config.steps` steps of `loss(params, items(k), key)`; the state in `config.out` is gone on from.

    Raises ValueError where that state is of other options.
    """
    told = {name: value for name, value in vars(config).items() if name not in ELSEWHERE}
    decay_from = max(config.steps - WARM_UP, 1)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0, config.learning_rate, WARM_UP), optax.linear_schedule(config.learning_rate, 0, decay_from)], [WARM_UP]
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        value, gradient = jax.value_and_grad(loss)(state["params"], batch, key)
        updates, optimiser_state = optimiser.update(gradient, state["optimiser"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(config.ema, (1 + state["step"]) / (10 + state["step"]))
        average = optax.incremental_update(params, state["average"], 1 - decay)
        return {"params": params, "average": average, "optimiser": optimiser_state, "step": state["step"] + 1}, value

    state = {"params": params, "average": jax.tree.map(jnp.copy, params), "optimiser": optimiser.init(params), "step": jnp.zeros((), jnp.int32)}
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / STATE
    if path.exists():
        record = config.out / CONFIG
        same(config.out, json.loads(record.read_bytes()) if record.is_file() else {}, told)
        state = serialization.from_bytes(state, path.read_bytes())
    running = None
    first = int(state["step"])
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=config.out.name, mininterval=10)
    for step in bar:
        state, value = train_step(state, items(step))
        if (step + 1) % 20 == 0:
            running = float(value) if running is None else 0.9 * running + 0.1 * float(value)
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            write(config.out, {CONFIG: to_json(told), STATE: serialization.to_bytes(state)})
    return state["average"]
