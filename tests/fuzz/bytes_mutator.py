"""Changes to bytes that know nothing of their meaning, and the numbers at which decoders break."""

from __future__ import annotations

import struct
from random import Random

EDGES = sorted(
    {
        sign * (1 << bits) + step
        for bits in (0, 7, 8, 14, 15, 16, 20, 21, 24, 28, 31, 32, 35, 49, 56, 62, 63, 64)
        for step in (-2, -1, 0, 1, 2)
        for sign in (1, -1)
    }
)


def edge(rng: Random, near: int, size_bits: int, *, signed: bool) -> int:
    """A number that is likely to be wrong in an interesting way: an edge, or a neighbour of what is there."""
    if rng.random() < 0.5:
        value = near + rng.choice((-64, -16, -8, -2, -1, 1, 2, 8, 16, 64))
    elif rng.random() < 0.8:
        value = rng.choice(EDGES)
    else:
        value = rng.getrandbits(size_bits)
    value &= (1 << size_bits) - 1
    return value - (1 << size_bits) if signed and value >> (size_bits - 1) else value


def mutate_field(data: bytearray, at: int, form: str, rng: Random) -> None:
    """Overwrites the number of struct format `form` at `at`, if it lies within `data`."""
    packer = struct.Struct("<" + form)
    if at < 0 or at + packer.size > len(data):
        return
    (old,) = packer.unpack_from(data, at)
    packer.pack_into(data, at, edge(rng, old, packer.size * 8, signed=form.islower()))


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """One blind change: bits, bytes, numbers, pieces cut, doubled, moved or zeroed."""
    changed = bytearray(data)
    at = rng.randrange(len(changed) + 1)
    size = min(1 << rng.randrange(9), len(changed) - at)
    match rng.randrange(8):
        case 0 if changed:
            changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
        case 1 if changed:
            changed[min(at, len(changed) - 1)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        case 2:
            mutate_field(changed, at, rng.choice("BHIQbhiq"), rng)
        case 3:
            del changed[at : at + size]
        case 4:
            source = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[source : source + size]
        case 5:
            changed[at : at + size] = bytes(size)
        case 6:
            changed[at:at] = rng.randbytes(1 << rng.randrange(6))
        case _:
            del changed[at:]
    return bytes(changed)
