"""The schedulers of diffusers: from a `scheduler_config.json` to a process, a grid, a solver and what the network is told. No torch."""

from ._scheduler import Scheduler as Scheduler, from_scheduler_config as from_scheduler_config
