"""Bounds on pictures and sound, checked before anything is decoded.

A small file can unpack to a very large picture or to days of sound, so sizes are taken from the
header of a picture, and sound is counted while it is decoded.
"""

from __future__ import annotations

MAX_FILES = 256
"""Pictures and pieces of sound of one request."""

MAX_PICTURE_BYTES = 128 << 20
"""Of a picture's file: larger than the PNG file of the largest camera in phones."""

MAX_PIXELS = 89_478_485
"""Of a picture: 268 MB of RGB, the bound past which Pillow itself warns of decompression bombs."""

MAX_SCANS = 100
"""Of a progressive JPEG, which has about ten: each costs a pass over the whole picture."""

MAX_SOUND_BYTES = 2 << 30
"""Of a recording's file: three hours of a CD are 1.9 GB."""

MAX_SECONDS = 3 * 60 * 60
"""Of one recording: 691 MB of samples at 16 kHz."""

SAMPLE_RATES = (1_000, 768_000)
"""The lowest and the highest sample rate of a recording; phones use 8,000 and studios 192,000."""

MAX_CHANNELS = 64
"""Of a recording."""
