"""Schedules found by search."""

from .._paths import cheapest_nodes as cheapest_nodes
from ._candidates import usual as usual
from ._following import distances as distances, fine_grid as fine_grid, follow as follow
from ._search import search_schedule as search_schedule
