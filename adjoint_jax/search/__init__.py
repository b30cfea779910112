"""Schedules found by search."""

from ._gits import cheapest_nodes as cheapest_nodes
