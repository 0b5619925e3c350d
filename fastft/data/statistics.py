"""Streaming statistics per channel."""

import numpy as np

# Values kept of each sample and channel for quantiles.
KEPT_PER_SAMPLE = 64


class ChannelStatistics:
    """Mean and spread per channel in float64, merged sample by sample, and each sample's extremes.

    The merge of means and squared deviations is exact for any offset (Chan, Golub & LeVeque 1983,
    eq. 2.1). Values that are not finite do not count.

    Attributes:
        count: finite values, `[C]`.
        mean: `[C]`.
    """

    def __init__(self, channels: int) -> None:
        self.count = np.zeros(channels)
        self.mean = np.zeros(channels)
        self._squares = np.zeros(channels)
        self._lows: list[np.ndarray] = []
        self._highs: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Adds one sample, `[C, N]`."""
        values = values.astype(np.float64)
        finite = np.isfinite(values)
        self._lows.append(np.where(finite, values, np.inf).min(axis=1))
        self._highs.append(np.where(finite, values, -np.inf).max(axis=1))
        stride = -(-values.shape[1] // KEPT_PER_SAMPLE)
        self._kept.append(np.where(finite, values, np.nan)[:, ::stride])

        count = finite.sum(axis=1)
        mean = np.where(finite, values, 0).sum(axis=1) / np.maximum(count, 1)
        squares = (np.where(finite, values - mean[:, None], 0) ** 2).sum(axis=1)
        total = self.count + count
        share = count / np.maximum(total, 1)
        delta = mean - self.mean
        self._squares += squares + delta**2 * self.count * share
        self.mean += delta * share
        self.count = total

    @property
    def samples(self) -> int:
        """Samples added."""
        return len(self._lows)

    @property
    def lows(self) -> np.ndarray:
        """Smallest value of each sample and channel, `[samples, C]`; +inf where none is finite."""
        return np.stack(self._lows)

    @property
    def highs(self) -> np.ndarray:
        """Largest value of each sample and channel, `[samples, C]`; -inf where none is finite."""
        return np.stack(self._highs)

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation, `[C]`."""
        return np.sqrt(self._squares / np.maximum(self.count, 1))

    def robust(self) -> tuple[np.ndarray, np.ndarray]:
        """Median and interquartile range / 1.349 (the std of normal data), `[C]` each.

        Up to a quarter of the values on either side may be wild. Channels whose quartiles coincide
        get the std. Computed from `KEPT_PER_SAMPLE` values of each sample.
        """
        center, spread = self.mean.copy(), self.std
        for channel, values in enumerate(np.concatenate(self._kept, axis=1)):
            values = values[~np.isnan(values)]
            if values.size:
                low, center[channel], high = np.quantile(values, (0.25, 0.5, 0.75))
                spread[channel] = (high - low) / 1.349 or spread[channel]
        return center, spread
