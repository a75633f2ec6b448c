"""The header that speech models leave out of their WAV files."""

import struct

_RATE_HZ = 24_000
_CHANNELS = 1
_SAMPLE_BYTES = 2
"""What Qwen-Omni and OpenAI's pcm16 send."""


def wav(pcm: bytes) -> bytes:
    """A playable WAV file of 16 bit, mono, 24 kHz samples; one that has its header already stays as it is."""
    if pcm.startswith(b"RIFF"):
        return pcm
    frame_bytes = _CHANNELS * _SAMPLE_BYTES
    samples = pcm[: len(pcm) - len(pcm) % frame_bytes]
    layout = (1, _CHANNELS, _RATE_HZ, _RATE_HZ * frame_bytes, frame_bytes, 8 * _SAMPLE_BYTES)
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *layout) + b"data" + struct.pack("<I", len(samples))
    return b"RIFF" + struct.pack("<I", len(head) + len(samples)) + head + samples
