"""What a GPU should take for a work, from its published peaks: a model, not a measurement."""

from __future__ import annotations

# Name within that of the device -> bytes/s of its memory, dense bfloat16 flops/s. From the vendors'
# data sheets, SXM and OAM versions.
PEAKS = {
    "A100": (2.039e12, 312e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8.0e12, 2250e12),
    "MI300X": (5.3e12, 1307e12),
}


def predicted_seconds(device: str, moved: int, flops: int) -> float | None:
    """Roofline: the larger of the times for the bytes and for the flops; None for other devices."""
    for name, (bandwidth, rate) in PEAKS.items():
        if name in device:
            return max(moved / bandwidth, flops / rate)
    return None
