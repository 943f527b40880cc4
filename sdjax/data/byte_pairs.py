"""Byte-pair encoding as in CLIP: the alphabet, the order of the vocabulary, learning of merges.

A vocabulary is 256 bytes, the same 256 as ends of words (`</w>`), one token per merge and the two
special tokens, so that the end token has the highest id, where CLIP's pooling looks for it.
Merges are learned by Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909, algorithm 1).
"""

import collections
import heapq
import itertools
from collections.abc import Iterable

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
  """{token: id} of these merges, in CLIP's order."""
  alphabet = _byte_alphabet()
  # Two pairs can spell one token ("ab" + "c", "a" + "bc"): both merge, it gets one id.
  merged = dict.fromkeys(a + b for a, b in merges)
  tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *merged, BOS, EOS]
  return {token: i for i, token in enumerate(tokens)}


def _byte_alphabet() -> list[str]:
  """One printable character per byte, in the order of CLIP's vocabulary (id 0 is "!")."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def learn(words: dict[tuple[str, ...], int], limit: int) -> list[tuple[str, str]]:
  """The `limit` most frequent pairs, each counted after the merges before it.

  Fewer when no pair occurs twice any more. Deterministic: equally frequent pairs are merged in
  alphabetical order.

  Args:
    words: how often each word occurs, spelled in tokens.
    limit: the number of merges.
  """
  spellings = sorted(words)
  times = [words[word] for word in spellings]
  count = collections.Counter()
  where = collections.defaultdict(set)  # pair → indices of the words that may hold it

  def add(index, sign):
    word = spellings[index]
    for pair in itertools.pairwise(word):
      count[pair] += sign * times[index]
      where[pair].add(index)

  for index in range(len(spellings)):
    add(index, +1)
  heap = [(-n, pair) for pair, n in count.items()]
  heapq.heapify(heap)
  merges = []
  while heap and len(merges) < limit:
    negative, pair = heapq.heappop(heap)
    if -negative != count[pair]:  # an old entry: its count has changed since
      continue
    if -negative < 2:
      break
    merges.append(pair)
    touched = set()
    for index in sorted(where.pop(pair)):
      touched.update(itertools.pairwise(spellings[index]))
      add(index, -1)
      spellings[index] = _merge(spellings[index], pair)
      add(index, +1)
      touched.update(itertools.pairwise(spellings[index]))
    for changed in sorted(touched):
      if count[changed] > 0:
        heapq.heappush(heap, (-count[changed], changed))
  return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
  merged, i = [], 0
  while i < len(word):
    if word[i:i + 2] == pair:
      merged.append(pair[0] + pair[1])
      i += 2
    else:
      merged.append(word[i])
      i += 1
  return tuple(merged)
