"""Is a figure of one expert out of the ordinary beside the same figure of the others?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Peers that it takes to say what is usual.
FEW = 5
#: The standard deviation of a normal distribution in units of its median absolute deviation.
MAD = 1.4826
#: No figure is said to be farther out than this.
FARTHEST = 1000.0


def robust_z(value: float, peers: Sequence[float], *, least: float = 0.0) -> float | None:
    """z = (value - median) / max(1.4826 MAD, least), of this value beside the peers' (Iglewicz and Hoaglin 1993).

    Unlike mean and deviation, the median and the median absolute deviation stay what they are when up to half of the
    peers are odd themselves. `least` is the spread that is of no interest: peers may be closer together than that. None
    when there are not enough peers to judge by. Figures that are not finite do not count; a value that is not has the
    largest z.
    """
    usual = np.array([peer for peer in peers if np.isfinite(peer)], np.float64)
    if len(usual) < FEW:
        return None
    if not np.isfinite(value):
        return -FARTHEST if value == -np.inf else FARTHEST
    middle = float(np.median(usual))
    spread = max(MAD * float(np.median(np.abs(usual - middle))), least)
    if value == middle:
        return 0.0
    if spread == 0:
        return FARTHEST if value > middle else -FARTHEST
    return min(max((value - middle) / spread, -FARTHEST), FARTHEST)
