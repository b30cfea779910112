"""Schedules found by search."""

from .._paths import cheapest_nodes as cheapest_nodes
from ._search import search_schedule as search_schedule
