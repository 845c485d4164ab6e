"""Records with realistic variety, the same every time."""

import json
import random

SEED = 20_130_101
DISTINCT_BYTES = 20_000_000
"""Distinct records, sent round and round: they do not fit a compression window or a CPU cache."""

KINDS = ("view", "click", "cart", "order", "refund", "search", "login")
WORDS = ("basket", "delivery", "discount", "gift", "invoice", "mobile", "newsletter", "partner", "return", "voucher")


def make_records(record_bytes: int) -> list[bytes]:
    """Returns JSON events of exactly `record_bytes` bytes: at least 100."""
    rng = random.Random(SEED)
    return [_event(rng, number, record_bytes) for number in range(DISTINCT_BYTES // record_bytes)]


def _event(rng: random.Random, number: int, record_bytes: int) -> bytes:
    event: dict[str, object] = {
        "id": f"{rng.getrandbits(48):012x}",
        "user": int(rng.paretovariate(0.9)) % 1_000_000,
        "kind": rng.choice(KINDS),
        "at": 1_700_000_000_000 + number * 7 + rng.randrange(7),
        "cents": int(rng.lognormvariate(7, 1)),
    }
    while len(json.dumps(event, separators=(",", ":"))) < record_bytes // 2:  # larger events have more fields
        event[f"{rng.choice(WORDS)}_{len(event)}"] = rng.choice(WORDS) if rng.random() < 0.5 else rng.getrandbits(20)
    text = json.dumps(event, separators=(",", ":")).encode()
    filler = record_bytes - len(text) - len(b',"ref":""')
    return text[:-1] + b',"ref":"' + f"{rng.getrandbits(4 * filler):0{filler}x}".encode() + b'"}'
