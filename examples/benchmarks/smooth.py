"""Whether a curve of costs is smooth: each point beside the line between its two neighbours.

    line(x) = cost of the left neighbour + (x - its x) * (difference of costs / difference of x)

The line is drawn through milliseconds, not through cost over the floor. Milliseconds are nearly a
straight line in the number of rows, in the rank, in the bytes of weights and in H * I, because each
step's work is. The floor bends where the bytes stop and the FLOPs begin to bound it, so that cost
over the floor bends there too, without any fault of the layer.
"""

from collections.abc import Sequence

# a point may cost so many times the line
ALLOWED = 1.10


def line_between_neighbours(
    xs: Sequence[float], costs: Sequence[float | None]
) -> list[float | None]:
    """The cost that a straight line between the two neighbours has at each point.

    Args:
        xs: increasing.
        costs: ms; None where nothing was measured. Such a point is no neighbour.
    Returns: None for the first and the last measured point, and for those not measured.
    Raises:
        ValueError: if xs do not increase, or if there are not as many of both.
    """
    if len(xs) != len(costs):
        raise ValueError(f"there are {len(xs)} xs and {len(costs)} costs; give one cost for each x")
    for i in range(1, len(xs)):
        if xs[i] <= xs[i - 1]:
            raise ValueError(f"x must increase, but {xs[i]} follows {xs[i - 1]}; sort the points")
    line: list[float | None] = [None] * len(xs)
    measured = [i for i, cost in enumerate(costs) if cost is not None]
    for left, here, right in zip(measured, measured[1:], measured[2:], strict=False):
        share = (xs[here] - xs[left]) / (xs[right] - xs[left])
        line[here] = (1 - share) * costs[left] + share * costs[right]
    return line


def above(cost: float | None, line: float | None) -> float | None:
    """cost / line - 1; None where one of them is missing."""
    if cost is None or line is None:
        return None
    return cost / line - 1


def is_flagged(cost: float | None, line: float | None) -> bool:
    """Whether a point costs more than is allowed."""
    return cost is not None and line is not None and cost > ALLOWED * line
