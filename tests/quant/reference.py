"""Quantization written out in numpy, in double precision and one block at a time."""

import itertools

import numpy as np


def blocks_of(shape, block_shape):
    """Yield the index of every block and the slices that cut it out."""
    starts = [range(0, n, b) for n, b in zip(shape, block_shape, strict=True)]
    for corner in itertools.product(*starts):
        index = tuple(s // b for s, b in zip(corner, block_shape, strict=True))
        cut = tuple(slice(s, s + b) for s, b in zip(corner, block_shape, strict=True))
        yield index, cut


def grid_over(low, high, largest, bits, scheme, dtype=np.float32):
    """Return scale and zero point (0 if symmetric) of the grid from low to high."""
    info = np.finfo(dtype)
    if largest == 0.0:
        return 1.0, 0
    if scheme == "symmetric":
        return max(high / (2 ** (bits - 1) - 1), float(info.tiny)), 0
    floor = max(float(info.eps) * largest, float(info.tiny))
    scale = max(high / (2**bits - 1) - low / (2**bits - 1), floor)
    return scale, -round(low / scale)


def integers_of(bits, scheme):
    """All integers of the grid."""
    if scheme == "symmetric":
        most = 2 ** (bits - 1) - 1
        return np.arange(-most, most + 1)
    return np.arange(2**bits)


def nearest(x, scale, zero_point, bits, scheme):
    """Return the nearest level of every entry, by exhaustive search."""
    levels = scale * (integers_of(bits, scheme) - zero_point)
    return levels[np.abs(x.ravel()[:, None] - levels).argmin(1)].reshape(x.shape)


def mean_square_error(x, low, high, bits, scheme):
    """Error of the nearest levels of a grid."""
    grid = grid_over(low, high, np.abs(x).max(), bits, scheme)
    return np.mean((nearest(x, *grid, bits, scheme) - x) ** 2)


def range_of(x, bits, scheme, calibration, percentile=99.9):
    """Return the ends of the range that a grid is to cover."""
    if scheme == "symmetric":
        if calibration == "percentile":
            high = np.percentile(np.abs(x), percentile)
        else:
            high = np.abs(x).max()
        if calibration == "mse":
            shares = np.arange(100, 0, -1) / 100
            errors = [
                mean_square_error(x, -s * high, s * high, bits, scheme) for s in shares
            ]
            high *= shares[int(np.argmin(errors))]
        return -high, high
    if calibration == "percentile":
        return tuple(np.percentile(x, [100 - percentile, percentile]))
    low, high = x.min(), x.max()
    if calibration == "mse":
        for move_low, move_high in ((1, 1), (0, 1), (1, 0)):
            best = (mean_square_error(x, low, high, bits, scheme), low, high)
            for share in np.arange(99, 0, -1) / 100:
                ends = (
                    x.mean() + share * (low - x.mean()) if move_low else low,
                    x.mean() + share * (high - x.mean()) if move_high else high,
                )
                best = min(best, (mean_square_error(x, *ends, bits, scheme), *ends))
            _, low, high = best
    return low, high


def quantize(x, bits, scheme, calibration, block_shape, percentile=99.9):
    """Return restored array and the scales, one per block."""
    restored = np.empty(x.shape)
    counts = [-(-n // b) for n, b in zip(x.shape, block_shape, strict=True)]
    scales = np.empty(counts)
    for index, cut in blocks_of(x.shape, block_shape):
        block = x[cut].astype(np.float64)
        low, high = range_of(block, bits, scheme, calibration, percentile)
        grid = grid_over(low, high, np.abs(block).max(), bits, scheme)
        scales[index] = grid[0]
        restored[cut] = nearest(block, *grid, bits, scheme)
    return restored, scales
