"""When a sample is read: a pure function of seed and step, the same on every host.

The rows of a run are numbered p = step · batch_size + row. Weights become whole shares m_s of a
cycle of M rows, dealt so that no source is ever a whole sample ahead or behind:

  (1)  |A_s(p) − p m_s / M| < 1,  A_s(p): rows of source s among the first p
       (Tijdeman 1980, "The chairman assignment problem",
       https://doi.org/10.1016/0012-365X(80)90269-1)

So row p is read as the rank A_s(p) of its source, which walks through epochs of its N samples:

  (2)  epoch e, place q = divmod(A_s(p), N)

An epoch is laid out as a matrix of D columns, filled row by row and read column by column. D is
the number of rows that the source has in a whole number of steps, so a column keeps to one row of
the batch. It is a reader, which goes round a stretch of the epoch; where it begins, (4b), is such
that the readers do not all come to a new unit in the same step:

  (3)   turn r, column c = divmod(q, D)
  (4a)  f(c) = c (N div D) + min(c, N mod D),  the place where the stretch of column c begins
  (4b)  m = f(c) + (r + c − f(c)) mod (f(c + 1) − f(c))

The stretches are cut into units of u neighbouring samples, in an order that is never stored:

  (5)  sample = u π(m div u) + m mod u + offset  (mod N),  π over the N div u whole units

π and offset are keyed by seed, source and epoch. π is a Feistel network over [0, a b) with a ≈ b
and a b ≥ N div u, walked along its cycle until it falls into the range (Black & Rogaway 2002,
"Ciphers with Arbitrary Finite Domains", https://doi.org/10.1007/3-540-45760-7_9, section 5).

(2) to (5) are bijections, so an epoch visits each sample exactly once. A step costs what the first
costs, a process computes its own rows without asking others, and the state is one number. A process
that keeps to some rows of the batch reads few units at a time, each from end to end. A reader takes
the next sample of its unit at least 8 steps later, so a batch is of as many units as it has rows
(but for a unit that lies across the end of a stretch). Small sources have u = 1: a plain shuffle.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from sdjax.errors import UserError

ORDER, DRAWS, BUCKETS = range(3)  # what `keys` are for
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 8                 # Four would do with ideal ones (Luby & Rackoff 1988); ours are cheap.
LEAST_HALF = np.uint64(4)  # With halves of 3 and 2, orders of 6 samples are not equally likely.

STEPS_PER_CYCLE = 100      # at most: weights in whole per cents come out exactly
UNIT = 16                  # samples, at most: about a megabyte of pictures
UNITS_PER_COLUMN = 8       # at least, or units become smaller: a stretch should hold many
STEPS_APART = 8            # samples of one unit, at least
COLUMNS = 1024             # at least, however small the batch: the places that it is drawn from


class Drawn(NamedTuple):
  """What some rows of a run read.

  Attributes:
    source: int32 [n].
    sample: int64 [n], in 0 … count of the source - 1.
    position: int64 [n], the row counted from the start of the run; what `uniforms` takes.
  """
  source: np.ndarray
  sample: np.ndarray
  position: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
  """The order in which a run reads its sources.

  Attributes:
    counts: samples of each source, at least 1.
    weights: share of each source in the rows, relative to the others; above 0. They are rounded to
      whole rows in as many steps as suit them best, up to 100; whole per cents need no rounding.
    batch_size: global.
    seed: of the order.

  Raises:
    UserError: a count, weight or batch size out of range.
  """
  counts: Sequence[int]
  weights: Sequence[float]
  batch_size: int
  seed: int

  def __post_init__(self):
    if self.batch_size < 1:
      raise UserError(f"batch_size {self.batch_size} is below 1; give at least one sample per step")
    if not 0 < len(self.counts) == len(self.weights):
      raise UserError(f"{len(self.counts)} sources and {len(self.weights)} weights; give at least "
                      "one source, and a weight for each")
    for number, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
      if count < 1:
        raise UserError(f"source {number} holds {count} samples; leave it out, or keep more of it")
      if not 0 < weight < math.inf:
        raise UserError(f"weight {weight} of source {number} is not above 0; leave the source out, "
                        "or give a positive number")
    if (lost := np.flatnonzero(self._shares[0] == 0)).size:
      raise UserError(f"weight {self.weights[lost[0]]} of source {lost[0]} is less than a row in "
                      f"{STEPS_PER_CYCLE} steps of {self.batch_size}; raise it, or leave it out")

  def rows(self, step: int, rows: slice = slice(None)) -> Drawn:
    """What one step reads, or some rows of it."""
    return self.at(positions(step, self.batch_size, rows))

  def at(self, position: np.ndarray) -> Drawn:  # int64 [n], from 0
    """What rows counted from the start of the run read."""
    cycle, place = np.divmod(position, len(self._cycle))
    source, before, share = (column[place] for column in self._cycle.T)
    count, columns, unit = (column[source] for column in self._layout.T)
    epoch, place = np.divmod(cycle * share + before, count)          # (2)
    key = _mix(keys(self.seed, ORDER, epoch) + source.astype(np.uint64))
    sample = _in_units(_by_columns(place, count, columns), count, unit, key)
    return Drawn(source.astype(np.int32), sample, position)

  @property
  def steps_per_epoch(self) -> Fraction:
    """Of the source that takes longest; with several sources, to within a sample."""
    shares, steps = self._shares
    return max(Fraction(int(count) * steps, int(share))
               for count, share in zip(self.counts, shares, strict=True))

  @functools.cached_property
  def _shares(self) -> tuple[np.ndarray, int]:
    """Rows of each source, int64 [s], in the number of steps that meets the weights best."""
    steps = np.arange(1, STEPS_PER_CYCLE + 1)
    wanted = np.outer(steps * self.batch_size, np.divide(self.weights, np.sum(self.weights)))
    error = np.abs(wanted - np.rint(wanted)).max(1) / steps
    error[(wanted < 0.5).any(1)] = math.inf   # no source may be rounded away
    best = error.round(9).argmin()            # the first of equal ones, so cycles are short
    shares = _round_to_sum(wanted[best], steps[best] * self.batch_size)
    return shares, int(steps[best])

  @functools.cached_property
  def _cycle(self) -> np.ndarray:
    """int64 [M 3]: the source of each row of a cycle, its rows before this one, its share."""
    shares = self._shares[0] // np.gcd.reduce(self._shares[0])
    source = _deal(shares.tolist())
    before = np.cumsum(source[:, None] == np.arange(len(shares)), axis=0)
    return np.stack([source, before[np.arange(len(source)), source] - 1, shares[source]], axis=1)

  @functools.cached_property
  def _layout(self) -> np.ndarray:
    """int64 [s 3]: N, D, u of each source."""
    shares, steps = self._shares
    counts = np.array(self.counts, np.int64)
    apart = max(STEPS_APART, COLUMNS // self.batch_size)
    columns = shares * -(-apart // steps)
    return np.stack([counts, columns, (counts // (columns * UNITS_PER_COLUMN)).clip(1, UNIT)], 1)


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
  streams = keys(seed, DRAWS, position)[:, None]
  bits = _mix(streams + np.arange(draws, dtype=np.uint64))
  return (bits >> np.uint64(11)) * 2.0**-53


def keys(seed: int, purpose: int, number: np.ndarray) -> np.ndarray:
  """Random uint64, one per entry of `number`; purposes share none."""
  root = _mix(np.full(number.shape, seed % 2**64, np.uint64)) + np.uint64(purpose)
  return _mix(_mix(root) + number.astype(np.uint64))


def _round_to_sum(wanted, total):
  """Whole numbers int64 next to `wanted` that add up to `total`: the largest remainders go up."""
  shares = np.floor(wanted).astype(np.int64)
  shares[np.argsort(shares - wanted, kind="stable")[:total - shares.sum()]] += 1
  return shares


def _deal(shares: Sequence[int]) -> np.ndarray:  # int64 [sum of shares]
  """The source of each row of a cycle by Tijdeman's rule, which holds (1).

  Of the sources that are not too far ahead, the one that would soonest be too far behind.
  """
  total = sum(shares)
  margin = total / (2 * max(2, len(shares)) - 2)
  behind = [0] * len(shares)               # p m_s − M A_s(p), in units of 1 / M rows
  dealt = np.empty(total, np.int64)
  for place in range(total):
    chosen, soonest = -1, math.inf
    for source, share in enumerate(shares):
      behind[source] += share
      rows_left = (total - margin - behind[source]) / share
      if behind[source] >= margin and rows_left < soonest:
        chosen, soonest = source, rows_left
    behind[chosen] -= total
    dealt[place] = chosen
  return dealt


def _by_columns(place, count, columns):
  """Places of an epoch that is laid out row by row and read column by column: (3) and (4)."""
  turn, column = np.divmod(place, columns)
  short, longer = np.divmod(count, columns)
  begin = column * short + np.minimum(column, longer)
  return begin + (turn + column - begin) % (short + (column < longer))


def _in_units(place, count, unit, key):
  """Samples at the places of an epoch whose units are shuffled: (5)."""
  number, within = np.divmod(place, unit)
  whole = np.flatnonzero(number < count // unit)  # what is left of the last unit stays the last
  number[whole] = _permute(number[whole], (count // unit)[whole], key[whole])
  offset = _mix(key) % count.astype(np.uint64)
  return (number * unit + within + offset.astype(np.int64)) % count


def _permute(place, count, key):
  """A keyed bijection of [0, count), entry by entry."""
  high = np.maximum(np.ceil(np.sqrt(count)).astype(np.uint64), LEAST_HALF)
  ids, count = place.astype(np.uint64), count.astype(np.uint64)
  low = np.maximum((count + high - np.uint64(1)) // high, LEAST_HALF)
  outside = np.arange(len(ids))
  while outside.size:
    ids[outside] = _feistel(ids[outside], high[outside], low[outside], key[outside])
    outside = outside[ids[outside] >= count[outside]]
  return ids.astype(np.int64)


def _feistel(value, high, low, key):
  """A bijection of [0, high · low): each round adds to one half a hash of the other."""
  left, right = np.divmod(value, low)
  half = np.uint64(32)                     # left and right are below 2^32, so sums do not wrap
  for _ in range(ROUNDS // 2):
    key = key + GOLDEN
    left = (left + (_mix(key + right) >> half)) % high
    key = key + GOLDEN
    right = (right + (_mix(key + left) >> half)) % low
  return left * low + right


def _mix(x: np.ndarray) -> np.ndarray:
  """Splitmix64 of Steele et al. 2014 (https://doi.org/10.1145/2714064.2660195), mod 2^64."""
  x = x + GOLDEN
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
