"""Schedules found by search."""

from ._gits import cheapest_nodes as cheapest_nodes
from ._search import search_schedule as search_schedule
