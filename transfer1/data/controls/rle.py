"""Run-length coded masks, as COCO writes them.

A mask of a clip is one column: its T * H * W pixels in the order of frames, rows, columns. Runs of
zeros and ones take turns, zeros first. Every run is a number in groups of five bits, least first,
each in one character from "0" on; bit 5 says that more follow, bit 4 of the last is the sign. From
the third run on (counted from zero), the number is the difference to the run two before it.
"""

from __future__ import annotations

import numpy as np

FIRST = ord("0")
MORE, SIGN, BITS = 0x20, 0x10, 5


def run_lengths(counts: str | bytes) -> np.ndarray:
    """Return the lengths of all runs, int64 [number of runs].

    Raises:
        ValueError: characters that are no run lengths, or a negative length.
    """
    data = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    groups = data.astype(np.int64) - FIRST
    last = (groups & MORE) == 0
    if groups.size == 0 or groups.min() < 0 or groups.max() > 0x3F or not last[-1]:
        raise ValueError("its counts are not run lengths as COCO codes them")
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(groups)) - np.repeat(starts, np.diff([*starts, len(groups)]))
    numbers = np.add.reduceat((groups & 0x1F) << (BITS * place), starts)
    ends = np.flatnonzero(last)
    negative = (groups[ends] & SIGN) != 0
    numbers -= np.where(negative, np.int64(1) << (BITS * (place[ends] + 1)), 0)
    # Undo the differences: all odd runs in one sum; of the even ones, run 0 and run 2 are plain.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    if numbers.min() < 0:
        raise ValueError("its counts give a run of negative length")
    return numbers


def encode(mask: np.ndarray) -> bytes:
    """Return the code of a mask whose pixels are 0 or not, in the order of its axes."""
    pixels = (np.asarray(mask).reshape(-1) != 0).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels, [2]])))
    runs = np.diff(np.concatenate([[0], edges])).tolist()
    code = bytearray()
    for i, run in enumerate(runs):
        number = run - (runs[i - 2] if i > 2 else 0)
        done = False
        while not done:
            group, number = number & 0x1F, number >> BITS
            done = number == (-1 if group & SIGN else 0)
            code.append(FIRST + group + (0 if done else MORE))
    return bytes(code)


def decode(runs: np.ndarray, start: int, end: int) -> np.ndarray:
    """Return pixels start..end - 1 of a mask, bool [end - start], without decoding the others."""
    edges = np.clip(np.concatenate([[0], runs.cumsum()]), start, end)
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, np.diff(edges))
