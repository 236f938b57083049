"""Which documents were seen before: exactly, or nearly (MinHash), by their token ids and in memory bounded by keys.

Two documents are as alike as their sets of shingles (runs of 7 consecutive ids, about 5 English words) overlap:
J = |A and B| / |A or B|. The smallest hash of a set is the same for both with probability J, and so are 8 smallest
hashes with J^8. 14 such bands of 8 are a document's near keys; a document that shares one with an earlier document that
was kept is taken for its copy, with probability 1 - (1 - J^8)^14:

    J     0.2      0.4      0.5     0.6     0.7     0.75    0.8     0.85    0.9
    P     0.00004  0.009    0.053   0.21    0.56    0.77    0.92    0.988   0.9996

The setting is FineWeb's (Penedo et al. 2024, arXiv:2406.17557, section 3.4); the idea is Broder's (1997, "On the
resemblance and containment of documents"). What is left out depends on the order of the documents alone.
"""

from __future__ import annotations

import hashlib

import numpy as np

from puna.data.permute import mix64

SHINGLE = 7  # token ids
BANDS, ROWS = 14, 8
# Shingles hashed at a time: 32-bit values and their temporaries stay in the second-level cache.
_CHUNK = 1 << 15

# Fixed for ever: keys of a job that goes on must be those of the job that began. The multipliers are odd, so that
# h -> a * h + b mod 2^32 is a permutation (multiply-shift, Dietzfelbinger et al. 1997, without the shift).
_DRAW = mix64(np.arange(1, 1 + SHINGLE + 2 * BANDS * ROWS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
_POSITIONS = _DRAW[:SHINGLE] | np.uint64(1)
_FACTORS = (_DRAW[SHINGLE::2] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
_OFFSETS = (_DRAW[SHINGLE + 1 :: 2] >> np.uint64(32)).astype(np.uint32)


def exact_keys(tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """One 64-bit hash (blake2b) of the ids of each document.

    Shapes: tokens (n,) of one integer type; document d is tokens[starts[d]:stops[d]]; returns (documents,) uint64.
    Among 10^9 different documents, 0.03 are expected to be taken for another one.
    """
    data = tokens.tobytes()
    width = tokens.itemsize
    spans = zip((starts * width).tolist(), (stops * width).tolist(), strict=True)
    digests = (hashlib.blake2b(data[a:b], digest_size=8).digest() for a, b in spans)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def minhash(tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The smallest value of each of 112 hashes over the shingles of each document.

    Shapes: as `exact_keys`; returns (documents, 112) uint32, all 2^32 - 1 for a document shorter than a shingle.
    """
    signatures = np.full((len(starts), BANDS * ROWS), 2**32 - 1, dtype=np.uint32)
    whole = np.flatnonzero(stops - starts >= SHINGLE)
    first = 0
    while first < len(whole):  # as many documents as fill a chunk, at least one
        sizes = (stops[whole[first:]] - starts[whole[first:]]).cumsum()
        last = first + max(1, int(np.searchsorted(sizes, _CHUNK, side="right")))
        rows = whole[first:last]
        signatures[rows] = _signatures([_shingles(tokens[starts[d] : stops[d]]) for d in rows])
        first = last
    return signatures


def _shingles(ids: np.ndarray) -> np.ndarray:
    """A 32-bit hash of every run of SHINGLE ids: (n,) -> (n - SHINGLE + 1,) uint32."""
    wide = ids.astype(np.uint64) + np.uint64(1)
    count = len(ids) - SHINGLE + 1
    total = np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(_POSITIONS):
        total += wide[place : place + count] * factor
    return (mix64(total) >> np.uint64(32)).astype(np.uint32)


def _signatures(shingles: list[np.ndarray]) -> np.ndarray:
    """(documents, 112) minima of the hashes of each document's shingles; a long document is taken in pieces."""
    if len(shingles) == 1 and len(shingles[0]) > _CHUNK:
        pieces = [shingles[0][i : i + _CHUNK] for i in range(0, len(shingles[0]), _CHUNK)]
        return np.min([_signatures([piece]) for piece in pieces], axis=0)
    values = np.concatenate(shingles)
    edges = np.cumsum([0, *(len(part) for part in shingles[:-1])])
    hashed = np.empty_like(values)
    minima = np.empty((BANDS * ROWS, len(shingles)), dtype=np.uint32)
    for row in range(BANDS * ROWS):
        np.multiply(values, _FACTORS[row], out=hashed)
        hashed += _OFFSETS[row]
        minima[row] = np.minimum.reduceat(hashed, edges)
    return minima.T


def band_keys(signatures: np.ndarray) -> np.ndarray:
    """One 64-bit key of every band of 8 minima: (documents, 112) uint32 -> (documents, 14) uint64.

    A row of zeros marks a document without a shingle: it resembles none.
    """
    parts = signatures.reshape(len(signatures), BANDS, ROWS).astype(np.uint64)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), parts.shape[:2])  # a band meets only its like
    for row in range(ROWS):
        keys = mix64(keys * np.uint64(0x9E3779B97F4A7C15) + parts[:, :, row])
    keys[(signatures == 2**32 - 1).all(axis=1)] = 0
    return keys


class KeySet:
    """A set of 64-bit keys in sorted runs, each more than twice as long as the next: 8 bytes a key, 16 while merging.

    A Python set takes about 70. Like a log-structured merge tree (O'Neil et al. 1996), all writes are merges of runs.
    """

    def __init__(self, keys: np.ndarray | None = None):
        self._runs = [np.unique(keys)] if keys is not None and len(keys) else []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which keys are in the set. Shapes: (n,) uint64 -> (n,) bool."""
        order = np.argsort(keys)  # sorted searches walk through a run's memory once
        wanted, found = keys[order], np.zeros(len(keys), dtype=bool)
        for run in self._runs:
            places = np.searchsorted(run, wanted)
            places[places == len(run)] = 0
            found |= run[places] == wanted
        answer = np.empty_like(found)
        answer[order] = found
        return answer

    def add(self, keys: np.ndarray) -> None:
        """Put keys into the set; some may be in it already."""
        run = np.unique(keys)
        run = run[~self.contains(run)]
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # merges two sorted runs in one pass
        if len(run):
            self._runs.append(run)


def keep_new(seen: KeySet, keys: np.ndarray) -> np.ndarray:
    """Which rows share no key with the set nor with an earlier row that is kept; the keys of those enter the set.

    Shapes: keys (rows, k) uint64; returns (rows,) bool. Rows of zeros are kept and enter nothing.
    """
    known = seen.contains(keys.ravel()).reshape(keys.shape)
    keep: np.ndarray = np.logical_not(known.any(axis=1) & keys.any(axis=1))
    values, counts = np.unique(keys[keep], return_counts=True)
    repeated = values[(counts > 1) & (values != 0)]
    here: set[int] = set()
    for row in np.flatnonzero(np.isin(keys, repeated).any(axis=1) & keep):  # few: copies within one batch
        mine = set(keys[row].tolist())
        keep[row] = not mine & here
        here |= mine if keep[row] else set()
    kept = keys[keep].ravel()
    seen.add(kept[kept != 0])
    return keep
