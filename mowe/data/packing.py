"""Packing decides which examples share a row of a batch."""

import dataclasses

import numpy as np

from mowe.data import sampling


@dataclasses.dataclass(frozen=True)
class PackedRows:
  """The examples of each row.

  Attributes:
    order: <int64>[num_examples], example indices, row after row.
    starts: <int64>[num_rows + 1], where each row begins and ends in `order`.
  """

  order: np.ndarray
  starts: np.ndarray

  @property
  def num_rows(self) -> int:
    """Number of rows."""
    return len(self.starts) - 1

  def examples(self, row: int) -> np.ndarray:
    """Returns the example indices of a row, <int64>[examples]."""
    return self.order[self.starts[row] : self.starts[row + 1]]


def pack_rows(
  bounds: np.ndarray, inputs_length: int, targets_length: int, seed: int
) -> PackedRows:
  """Fills rows with examples in a seeded order, by next fit.

  A row ends where the next example would not fit. Next fit is used and not a
  better fit, because the end of a row that begins at example i is then found in
  running sums: 10 million examples take a few seconds.

  Args:
    bounds: <int>[num_examples, 2], the most tokens of inputs and of targets of
      each example.
    inputs_length: number of tokens of inputs in a row; no example exceeds it.
    targets_length: number of tokens of targets in a row; no example exceeds it.
    seed: seed of the order.
  """
  order = sampling.permute(np.arange(len(bounds)), len(bounds), (seed, 0))
  totals = np.zeros((len(bounds) + 1, 2), np.int64)
  np.cumsum(bounds[order], axis=0, out=totals[1:])
  # For a row that begins at each example, the first example that does not fit.
  ends = np.minimum(
    np.searchsorted(totals[:, 0], totals[:, 0] + inputs_length, 'right'),
    np.searchsorted(totals[:, 1], totals[:, 1] + targets_length, 'right'),
  )
  ends = (ends - 1).tolist()
  starts = [0]
  while starts[-1] < len(bounds):
    starts.append(ends[starts[-1]])
  return PackedRows(order, np.asarray(starts))
