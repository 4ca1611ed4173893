"""When gates stay open, when they are pressed, and when the consensus is settled."""

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any

from keras import ops


@dataclass(frozen=True)
class Schedule:
    """The course of one training run, in fractions of its steps.

    1. warm-up: all gates open, they learn nothing, until `warmup`;
    2. pressure: the target grows from 0 to the requested sparsity until `ramp`, polarization with
       it, and stays there;
    3. settle: at `settle` the consensus is fixed to the requested sparsity;
    4. the rest of the run trains the static sub-network.

    Args:
        warmup: end of the warm-up.
        ramp: end of the growing target.
        settle: when the consensus is fixed.
        steps: training steps of the whole run; None takes them from `fit`. Custom training loops
            must say it.
        polarization: weight of the polarization loss at full pressure.
        rate: how much the sparsity multiplier grows in a whole run of which all of the sparsity
            is missing. Small: the gates are ranked rather than pushed, and what the ranking says
            happens when they are settled.

    Raises:
        TypeError: an argument is not a number, or `steps` not an int.
        ValueError: the fractions are not 0 <= warmup <= ramp <= settle <= 1, steps < 1, or a weight
            or rate is negative or not finite.

    Example:

        >>> keras_polar.apply(model, 0.5, schedule=keras_polar.Schedule(settle=0.6))
    """

    warmup: float = 0.02
    ramp: float = 0.12
    settle: float = 0.2
    steps: int | None = None
    polarization: float = 4.0
    rate: float = 10.0

    def __post_init__(self) -> None:
        for name in ("warmup", "ramp", "settle", "polarization", "rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(
                    f"Schedule: expected {name} as a number, received {name}={value!r}."
                )
        if self.steps is not None and not isinstance(self.steps, numbers.Integral):
            raise TypeError(f"Schedule: expected steps as an int or None, received {self.steps!r}.")
        self._check_ranges()

    def _check_ranges(self) -> None:
        if not 0 <= self.warmup <= self.ramp <= self.settle <= 1:
            raise ValueError(
                "Schedule: expected 0 <= warmup <= ramp <= settle <= 1, received "
                f"warmup={self.warmup}, ramp={self.ramp}, settle={self.settle}."
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Schedule: expected steps >= 1 or None, received {self.steps}.")
        if not (0 <= self.polarization < math.inf and 0 <= self.rate < math.inf):
            raise ValueError(
                "Schedule: expected polarization >= 0 and rate >= 0, both finite, received "
                f"polarization={self.polarization}, rate={self.rate}."
            )

    def get_config(self) -> dict:
        return asdict(self)

    def pressure(self, step: Any, steps: Any) -> Any:
        """The pressure in [0, 1] at a step of a run of `steps` (0: length unknown, no pressure)."""
        return self._between(self.warmup, self.ramp, step, steps)

    def certainty(self, step: Any, steps: Any) -> Any:
        """Grows from 0 at the end of the warm-up to 1 at the settle step."""
        return self._between(self.warmup, self.settle, step, steps)

    def _between(self, start: float, end: float, step: Any, steps: Any) -> Any:
        progress = step / ops.maximum(steps, 1.0) * ops.cast(steps > 0, "float32")
        return ops.clip((progress - start) / max(end - start, 1e-6), 0.0, 1.0)

    def settle_step(self, steps: int) -> int:
        """The number of steps after which a run of `steps` settles."""
        return max(1, round(self.settle * steps))
