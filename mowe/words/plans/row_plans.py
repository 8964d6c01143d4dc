"""Plans which rows of a memory a batch needs, each of them once.

As with word experts, the host decides and all sizes are static, so that a step
is compiled once: a batch that names more rows than fit takes the next size of a
fixed ladder. The choice depends on the batch alone, so that a resumed run makes
the same one.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from mowe.words.addresses import address_base
from mowe.words.plans import batch_plans

_logger = logging.getLogger(__name__)

# For tables of up to so many rows, a planner keeps the place of every row: 256
# MB for the largest of them. It is ten times faster than to search.
_MOST_KEPT = 2**26


class RowsPlan(NamedTuple):
  """The rows of one memory that a batch names.

  Attributes:
    rows: <int32>[size], the distinct rows, ascending. Unused places have
      distinct numbers from the number of rows on, so that a scatter into the
      table drops them.
    places: stream -> <int32>[batch, length, slots], the place in `rows` of each
      row that a token names, -1 for none; with microbatches
      [number, batch / number, length, slots].
  """

  rows: np.ndarray
  places: dict[str, np.ndarray]

  def present_experts(self, num_rows: int) -> np.ndarray:
    """Returns the rows that the batch names, <int32>[n]."""
    return self.rows[self.rows < num_rows]

  def num_tokens(self) -> int:
    """Returns how often tokens name rows."""
    return sum(int(np.count_nonzero(x >= 0)) for x in self.places.values())

  def renumbered(
    self, renumber: Callable[[np.ndarray], np.ndarray]
  ) -> 'RowsPlan':
    """Returns the same plan with other numbers of rows."""
    return self._replace(rows=renumber(self.rows))


class RowPlanner:
  """Plans the rows of one memory.

  Args:
    address: names the rows of tokens.
    streams: which of 'encoder' and 'decoder' read the memory.
    num_rows: rows of the table, of which the address may name fewer.
    trial_batches: batches of token ids from which the sizes are made.
    num_microbatches: number of parts into which a step cuts the batch.

  Attributes:
    rows_at_once: number of rows that the first size has places for.
    sizes_used: the number of batches for which each size was taken so far, by
      its index in the ladder.

  Raises:
    ValueError: there is no trial batch.
  """

  def __init__(
    self,
    address: address_base.Address,
    *,
    streams: tuple[str, ...],
    num_rows: int,
    trial_batches: Iterable[Mapping[str, np.ndarray]],
    num_microbatches: int = 1,
  ):
    self._address = address
    self._streams = streams
    self._num_rows = num_rows
    self._num_microbatches = num_microbatches
    self.sizes_used: dict[int, int] = {}
    # Batches are planned by several threads at once.
    self._kept = threading.local()
    seen, uses = 0, 0
    for batch in trial_batches:
      named = self._named(batch)
      uses = sum(rows.size for rows in named.values())
      seen = max(seen, len(_distinct(named)))
    if not uses:
      raise ValueError(
        'Plans of a memory need at least one trial batch, but there was none. '
        'Give a batch of training examples.'
      )
    # The last size holds whatever a batch of this shape can name.
    most = min(uses, num_rows)
    self._ladder = [
      min(most, max(1, round(seen * factor)))
      for factor in batch_plans.PROFILE_FACTORS
    ] + [most]
    self.rows_at_once = self._ladder[0]

  def __call__(self, batch: Mapping[str, np.ndarray]) -> RowsPlan:
    """Plans a batch of token ids.

    Args:
      batch: `encoder_input_tokens` and so on, <int32>[batch, length].
    """
    named = self._named(batch)
    distinct = _distinct(named)
    size = self._size(len(distinct))
    # Numbers from `num_rows` on stand for no row.
    rows = self._num_rows + np.arange(size, dtype=np.int32)
    rows[: len(distinct)] = distinct
    places = {
      stream: self._cut(self._places(of_stream, distinct))
      for stream, of_stream in named.items()
    }
    return RowsPlan(rows, places)

  def _places(self, rows: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """The place of each row among distinct ones; -1 for none."""
    if self._num_rows > _MOST_KEPT:
      places = np.searchsorted(distinct, rows).astype(np.int32)
    else:
      if not hasattr(self._kept, 'places'):
        self._kept.places = np.zeros(self._num_rows, np.int32)
      # Places of rows that are not in this batch are of earlier ones, and are
      # not read.
      self._kept.places[distinct] = np.arange(len(distinct), dtype=np.int32)
      places = np.take(self._kept.places, rows, mode='clip')
    return np.where(rows >= 0, places, np.int32(-1))

  def _named(self, batch) -> dict[str, np.ndarray]:
    """Stream -> the rows its tokens name, <int32>[batch, length, slots]."""
    rows_of = {
      'encoder': self._address.encoder_rows,
      'decoder': self._address.decoder_rows,
    }
    return {
      stream: rows_of[stream](
        batch[f'{stream}_input_tokens'], batch.get(f'{stream}_segment_ids')
      )
      for stream in self._streams
    }

  def _size(self, number: int) -> int:
    """The first size of the ladder with so many places."""
    if number > self._ladder[-1]:
      raise ValueError(
        'Every batch must have the shape of the trial batches from which plans '
        f'were sized, but one names {number:,} rows and at most '
        f'{self._ladder[-1]:,} fit. Give trial batches of the same shape.'
      )
    index = int(np.searchsorted(self._ladder, number))
    if index and index not in self.sizes_used:
      _logger.warning(
        'A batch names more rows than the trial batches: the step is compiled '
        'for size %d of %d.',
        index + 1,
        len(self._ladder),
      )
    self.sizes_used[index] = self.sizes_used.get(index, 0) + 1
    return self._ladder[index]

  def _cut(self, places: np.ndarray) -> np.ndarray:
    if self._num_microbatches == 1:
      return places
    return np.stack(batch_plans.microbatches(places, self._num_microbatches))


def _distinct(named: Mapping[str, np.ndarray]) -> np.ndarray:
  """All rows that are named, each once, ascending."""
  rows = np.sort(np.concatenate([x.reshape(-1) for x in named.values()]))
  is_first = np.diff(rows, prepend=-1) > 0
  return rows[is_first]
