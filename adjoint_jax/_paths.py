"""The cheapest way over some of many nodes, by dynamic programming: of a teacher grid for a few steps (GITS, Chen et al. 2024), or of an adjoint.

With C_ij the error of one jump from node i to node j > i, and V_k(i) the least cost of going from i to the last node in k jumps,

    V_1(i) = C_{i,last},    V_k(i) = min_{i < j < last} C_ij + gamma V_{k-1}(j).                                            (1)

gamma > 1 weighs later errors more, for a jump's error is carried on.
"""

import numpy as np
from jaxtyping import Float, Int


def cheapest_nodes(cost: Float[np.ndarray, "nodes _"], steps: int, *, coefficient: float = 1.15) -> Int[np.ndarray, " times"]:
    """The `steps + 1` indices, from 0 to the last, of least cost (1); of equally cheap ones the first.

    Args:
        cost: C, of which the part above the diagonal is read.
        steps: the number of jumps.
        coefficient: gamma.
    Raises:
        ValueError: where there are fewer nodes than `steps + 1`, or C is not square.
    Reference:
        Chen et al. 2024 (GITS).
    Example:
        grid = teacher_grid[cheapest_nodes(cost, 8)]
    """
    cost = np.asarray(cost, np.float64)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"The cost is a square matrix, one row a node; got shape {cost.shape}.")
    last = len(cost) - 1
    if not 1 <= steps <= last:
        raise ValueError(f"{steps} steps do not fit into {last} intervals of the teacher grid: give 1 to {last}.")
    forward = np.triu(np.ones((last, last), bool), 1)
    value, follow = cost[:last, last], []
    for _ in range(steps - 1):  # (1)
        total = np.where(forward, cost[:last, :last] + coefficient * value, np.inf)
        value, follow = np.min(total, axis=1), [np.argmin(total, axis=1), *follow]
    nodes = [0]
    for best in follow:
        nodes.append(int(best[nodes[-1]]))
    return np.array([*nodes, last])
