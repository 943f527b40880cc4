"""When a sample is read: a pure function of seed and step, the same on every host.

The positions of a run, p = step · batch_size + row, walk through epochs of `count` samples. Epoch e
visits them in the order of a permutation that is never stored:

  (1)  epoch e = p div count,  place q = p mod count
  (2)  id = π_{seed, e}(q),  π a Feistel network over [0, 4^k) ⊇ [0, count), walked along its
       cycle until it falls into [0, count) (Black & Rogaway 2002, "Ciphers with Arbitrary Finite
       Domains", https://doi.org/10.1007/3-540-45760-7_9, sections 4 and 5)

So step 10^7 costs what step 0 costs, a process computes its own rows without asking others, and the
state of the data is one number. 4^k < 4 · count, so a walk takes under four tries on average.
"""

import numpy as np

ROUNDS = 8  # Four would do with ideal rounds (Luby & Rackoff 1988); ours are cheap, not ideal.


def sample_ids(
    seed: int,
    step: int,
    batch_size: int,           # global
    count: int,                # of samples in the data set, at least 1
    rows: slice = slice(None),
) -> np.ndarray:               # int64 [rows]
  """Ids in [0, count) of the samples of one step, or of some rows of it.

  Every epoch visits each sample exactly once; epochs may begin in the middle of a batch.
  """
  position = positions(step, batch_size, rows)
  epoch, place = np.divmod(position, count)
  return _permute(place, count, _keys(seed, 0, epoch))


def positions(step: int, batch_size: int, rows: slice = slice(None)) -> np.ndarray:
  """Numbers int64 [rows] of a step's rows, counted from the start of the run."""
  return step * batch_size + np.arange(batch_size, dtype=np.int64)[rows]


def uniforms(
    seed: int,
    position: np.ndarray,      # int64 [rows]
    draws: int,
) -> np.ndarray:               # float64 [rows draws] in [0, 1)
  """Random numbers that belong to a position, whoever reads it: for crops, captions, drop-out.

  A hash of (seed, position, draw) rather than a generator per position, whose set-up (34 µs)
  would cost more than decoding a small picture.
  """
  streams = _keys(seed, 1, position)[:, None]
  bits = _mix(streams + np.arange(draws, dtype=np.uint64))
  return (bits >> np.uint64(11)) * 2.0**-53


def _keys(seed: int, purpose: int, number: np.ndarray) -> np.ndarray:
  """uint64, one per entry of `number`; purposes share no key."""
  root = _mix(np.full(number.shape, seed % 2**64, np.uint64)) + np.uint64(purpose)
  return _mix(_mix(root) + number.astype(np.uint64))


def _permute(place: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
  bits = max(1, ((count - 1).bit_length() + 1) // 2)  # per half
  ids = place.astype(np.uint64)
  outside = np.ones(ids.shape, bool)
  while outside.any():
    ids[outside] = _feistel(ids[outside], bits, keys[outside])
    outside = ids >= count
  return ids.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
  """A bijection of [0, 4^bits): each round xors one half with a hash of the other."""
  width, mask = np.uint64(bits), np.uint64(2**bits - 1)
  left, right = value >> width, value & mask
  for number in range(ROUNDS):
    left, right = right, left ^ (_mix(right + _mix(keys + np.uint64(number))) & mask)
  return (left << width) | right


def _mix(x: np.ndarray) -> np.ndarray:
  """Splitmix64 of Steele et al. 2014 (https://doi.org/10.1145/2714064.2660195), mod 2^64."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
