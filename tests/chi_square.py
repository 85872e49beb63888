"""Pearson's test of draws against enumerated probabilities."""

import collections

import jax.scipy.special
import numpy as np


def surprise(draws, table):
    """-log10 of the p-value: above 5 once in 100,000 times by chance.

    Args:
      draws: keys of `table`; a key of probability zero is not tolerated.
      table: {key: probability}; cells that expect fewer than 5 draws are merged.
    """
    counts = collections.Counter(draws)
    assert all(table.get(key, 0) > 0 for key in counts), "an impossible outcome was drawn"
    expected = np.array(list(table.values()), np.float64) * sum(counts.values())
    found = np.array([counts[key] for key in table], np.float64)
    small = expected < 5
    if small.any():
        expected = np.append(expected[~small], max(expected[small].sum(), 1e-9))
        found = np.append(found[~small], found[small].sum())
    x, dof = ((found - expected) ** 2 / expected).sum(), len(found) - 1
    p = float(jax.scipy.special.gammaincc(np.float64(dof / 2), np.float64(x / 2)))
    return -np.log10(max(p, 1e-300))
