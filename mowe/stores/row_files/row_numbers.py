"""Numbers the rows that were met, so that memory grows with those alone."""

import numpy as np

_NONE = -1
_FIRST_ROOM = 1024
# The multiplier of Fibonacci hashing, 2^64 divided by the golden ratio. Source:
# Knuth, The Art of Computer Programming, volume 3, section 6.4.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class RowNumbers:
  """Gives each row that is met the next number, from 0.

  It is a hash table with linear probing. All calls take arrays, and cost as
  much as the rows that are given.
  """

  def __init__(self):
    self._room(_FIRST_ROOM)
    # The row of each number; more than `len(self)` have room.
    self._rows = np.zeros(_FIRST_ROOM // 2, np.int64)
    self._count = 0

  def __len__(self) -> int:
    """How many rows were met."""
    return self._count

  @property
  def rows(self) -> np.ndarray:
    """The row of each number, <int64>[n]."""
    return self._rows[: self._count]

  def find(self, rows: np.ndarray) -> np.ndarray:
    """Returns the numbers <int64>[n] of rows <int>[n]; -1 if never met."""
    rows = np.asarray(rows, np.int64)
    found = np.full(len(rows), _NONE, np.int64)
    pending = np.arange(len(rows))
    places = self._first_places(rows)
    while len(pending):
      keys = self._keys[places]
      is_found = keys == rows[pending]
      found[pending[is_found]] = self._values[places[is_found]]
      goes_on = ~is_found & (keys != _NONE)
      pending = pending[goes_on]
      places = (places[goes_on] + 1) & self._mask
    return found

  def add(self, rows: np.ndarray) -> np.ndarray:
    """Returns the numbers <int64>[n] of distinct rows <int>[n].

    Rows that were never met get the next numbers in their order.
    """
    rows = np.asarray(rows, np.int64)
    numbers = self.find(rows)
    is_new = numbers == _NONE
    count = self._count + int(is_new.sum())
    if count > len(self._rows):
      room = 1 << int(2 * count - 1).bit_length()
      self._rows = np.resize(self._rows, room // 2)
      self._room(room)
      self._insert(self._rows[: self._count], np.arange(self._count))
    new = np.arange(self._count, count)
    numbers[is_new] = new
    self._rows[self._count : count] = rows[is_new]
    self._insert(rows[is_new], new)
    self._count = count
    return numbers

  def _room(self, room):
    """Empties the table, which then has so many places, a power of two."""
    self._mask = room - 1
    self._shift = np.uint64(64 - self._mask.bit_length())
    self._keys = np.full(room, _NONE, np.int64)
    self._values = np.zeros(room, np.int64)

  def _first_places(self, rows):
    mixed = rows.astype(np.uint64) * _MULTIPLIER
    return (mixed >> self._shift).astype(np.int64)

  def _insert(self, rows, numbers):
    """Puts distinct rows that are not in the table there."""
    places = self._first_places(rows)
    while len(rows):
      is_free = self._keys[places] == _NONE
      self._keys[places[is_free]] = rows[is_free]
      # Of several rows that took one place, the last one has it.
      has = self._keys[places] == rows
      self._values[places[has]] = numbers[has]
      rows, numbers = rows[~has], numbers[~has]
      places = (places[~has] + 1) & self._mask
