"""The searched settings of trials as numbers: places between 0 and 1, and levels (thirds, or choices)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fashion.search.space import CHOICES, LOG_UNIFORM, SearchConfig

Places = NDArray[np.float64]
LEVEL_NAMES = ("lowest third", "middle third", "highest third")


@dataclass(frozen=True)
class Setting:
    """A setting that a search draws, and the values that were tried."""

    name: str
    values: Sequence[Any]
    """Value of each trial: a number, or the name of a choice."""
    low: float = 0.0
    """Least value that could be drawn or was tried; of no meaning for choices."""
    high: float = 1.0
    """Greatest value that could be drawn or was tried."""

    @property
    def is_choice(self) -> bool:
        """Whether the setting is chosen from names."""
        return self.name in CHOICES

    @property
    def is_constant(self) -> bool:
        """Whether all trials have the same value."""
        return len(set(self.values)) < 2

    @property
    def choices(self) -> list[str]:
        """The names that were tried, in alphabetical order."""
        return sorted({str(value) for value in self.values})

    def of(self, rows: Sequence[int]) -> Self:
        """Return the setting as some of the trials have it, in the same range."""
        return replace(self, values=[self.values[row] for row in rows])

    def places(self) -> Places:
        """Return where each value lies between `low` (0) and `high` (1), (trials,) float64; numbers only.

        Log-uniform settings are placed by their logarithm, as they are drawn.
        """
        low, high = self._scale(self.low), self._scale(self.high)
        return np.array([(self._scale(value) - low) / ((high - low) or 1.0) for value in self.values])

    def value_at(self, place: float) -> float:
        """Return the value that lies at `place`, the inverse of `places`; an end of the range beyond 0 and 1."""
        if not 0 < place < 1:
            return self.low if place <= 0 else self.high
        low, high = self._scale(self.low), self._scale(self.high)
        value = low + place * (high - low)
        return math.exp(value) if self._is_log else value

    @property
    def _is_log(self) -> bool:
        # `--first` may give a weight decay of 0.
        return self.name in LOG_UNIFORM and self.low > 0

    def _scale(self, value: float) -> float:
        return math.log(value) if self._is_log else float(value)

    def thirds(self) -> tuple[float, float] | None:
        """Return the two values that cut the trials into thirds; None for choices and where there are no thirds."""
        if self.is_choice or len(set(self.values)) < 3:
            return None
        first, second = np.quantile(self.places(), [1 / 3, 2 / 3])
        return self.value_at(float(first)), self.value_at(float(second))

    def levels(self) -> tuple[NDArray[np.int64], list[str]]:
        """Return the level of each trial, (trials,) int64 from 0, and the levels' names.

        Numbers have three levels of as many trials each, the thirds of their values; choices, and numbers of which only
        two were tried, have a level for each value.
        """
        if self.is_choice or len(set(self.values)) < 3:
            order: list[Any] = sorted(set(self.values))
            number = {value: place for place, value in enumerate(order)}
            names = [str(value) if self.is_choice else f"{value:.3g}" for value in order]
            return np.array([number[value] for value in self.values], dtype=np.int64), names
        places = self.places()
        thirds = np.searchsorted(np.quantile(places, [1 / 3, 2 / 3]), places, side="left")
        there, levels = np.unique(thirds, return_inverse=True)  # where many values are equal, a third may be empty
        return levels.astype(np.int64), [LEVEL_NAMES[number] for number in there]


def settings_of(config: SearchConfig, drawn: Sequence[dict[str, Any]]) -> list[Setting]:
    """Return the searched settings with the values that trials have, `drawn[trial][name]`.

    A range covers what can be drawn, and what `--first` gave besides.
    """
    found = []
    for name in config.searched():
        values = [settings[name] for settings in drawn]
        bounds = [] if name in CHOICES else [float(bound) for bound in getattr(config, name)]
        numbers = [*bounds, *values] if name not in CHOICES else [0.0, 1.0]
        found.append(Setting(name, values, min(numbers), max(numbers)))
    return found
