"""Makes batches, packed or not, as a pure function of the seed and the step."""

import abc
import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from mowe.data import packing, sampling, text_tasks

Batch = dict[str, np.ndarray]
Example = tuple[np.ndarray, np.ndarray]


class BatchSource(abc.ABC):
  """Training batches without end, which can begin at any step."""

  @abc.abstractmethod
  def from_step(self, first_step: int = 0) -> Iterator[Batch]:
    """Yields the batches from `first_step` on, without end."""

  @functools.cached_property
  def first_batch(self) -> Batch:
    """The batch of step 0, which is made once: opening a stream takes long."""
    return next(self.from_step(0))

  def batch_maker(self, first_step: int) -> Callable[[int], Batch]:
    """Returns a function that takes each step in turn and returns its batch.

    Args:
      first_step: the step with which the function is called first. It is
        called from one thread.
    """
    batches = self.from_step(first_step)
    return lambda step: next(batches)

  def of_rows(self, rows: np.ndarray) -> 'BatchSource':
    """Returns a source that need make only some rows of each batch.

    A process of several makes those that its devices read. Batches keep their
    shape; what other rows hold is not said.

    Args:
      rows: <int>[n], the numbers of the rows, from 0 on.
    """
    del rows
    return self

  def report(self) -> dict[str, dict[str, int]]:
    """Returns counts of examples and rows by the name of each task.

    A source that reads a stream has counted nothing when a run starts.
    """
    return {}

  def epochs(self, num_steps: int) -> dict[str, float]:
    """Returns how often a run of some steps reads each task, by its name.

    The length of a stream is not known, so a stream returns nothing.
    """
    del num_steps
    return {}


class RandomAccessSource(BatchSource):
  """Batches that are functions of their step: none needs those before it."""

  @abc.abstractmethod
  def __call__(self, step: int) -> Batch:
    """Returns the batch of a step, from 0 on."""

  def from_step(self, first_step: int = 0) -> Iterator[Batch]:
    return map(self, itertools.count(first_step))

  def batch_maker(self, first_step: int) -> Callable[[int], Batch]:
    """Returns a function that any number of threads may call for any step."""
    return self


class Batches(RandomAccessSource):
  """Training batches of a task or a mixture of tasks, without end.

  Every example of a task comes once per epoch of that task, in an order that is
  drawn anew for each epoch. `batches(step)` depends on nothing but the
  arguments of this class and the step, so that resuming needs only the step.

  With packing, examples of one task share rows. They are grouped once, and the
  rows are shuffled in each epoch. The rates of a mixture are rates of examples;
  with packing they hold on average.

  Args:
    tasks: one task, or pairs of a task and its rate. Rates need not sum to one.
    batch_size: number of rows of a batch.
    feature_lengths: number of tokens of 'inputs' and 'targets' in a row, EOS
      included.
    seed: seed of all orders and of the tasks' noise, at least 0.
    pack: puts several examples into a row, with segment ids and positions.
    make_batch_of: function that makes a batch of rows; None takes `make_batch`.
      A model with one stack needs `lm_batches.make_batch`.

  Call: takes a step from 0 on, returns its batch (see docs/architecture/data.md
    for the fields).

  Raises:
    ValueError: there is no task, the batch size is below 1, a rate is not
      positive, or examples of a task are longer than the feature lengths.
  """

  def __init__(
    self,
    tasks: text_tasks.Task | Sequence[tuple[text_tasks.Task, float]],
    batch_size: int,
    feature_lengths: Mapping[str, int],
    seed: int = 0,
    pack: bool = False,
    make_batch_of: Callable[..., Batch] | None = None,
  ):
    pairs = list(tasks) if isinstance(tasks, Sequence) else [(tasks, 1.0)]
    if not pairs or batch_size < 1 or seed < 0:
      raise ValueError(
        'Batches need at least one task, a batch_size of at least 1 and a '
        f'seed of at least 0, but got {len(pairs)} tasks, batch_size '
        f'{batch_size} and seed {seed}. Change what is out of range.'
      )
    self.tasks = tuple(task for task, _ in pairs)
    self.batch_size = batch_size
    self.feature_lengths = {'inputs': 0, **feature_lengths}
    self.pack = pack
    self._make_batch = make_batch_of or make_batch
    self._seed = seed
    self._own_rows = np.arange(batch_size)
    for task in self.tasks:
      _check_fit(task, self.feature_lengths)
    self._rows = [self._pack(number) for number in range(len(pairs))]
    # A packed row of a task holds several of its examples. Rows that are dealt
    # out at rate / (examples per row) deal examples out at the rate.
    rates = [
      rate * _num_rows(rows, task) / task.num_examples
      for (task, rate), rows in zip(pairs, self._rows, strict=True)
    ]
    self._mixture = sampling.TaskMixture(rates, seed)

  @property
  def steps_per_epoch(self) -> int:
    """Number of steps that take as many rows as all tasks have together."""
    rows = sum(map(_num_rows, self._rows, self.tasks))
    return math.ceil(rows / self.batch_size)

  def __call__(self, step: int) -> Batch:
    numbers = step * self.batch_size + self._own_rows
    tasks, ranks = self._mixture.locate(numbers)
    rows: list[list[Example]] = [[] for _ in range(self.batch_size)]
    for task in np.unique(tasks).tolist():
      here = np.flatnonzero(tasks == task)
      made = self._task_rows(task, ranks[here])
      for place, row in zip(self._own_rows[here].tolist(), made, strict=True):
        rows[place] = row
    return self._make_batch(rows, self.feature_lengths, segments=self.pack)

  def of_rows(self, rows: np.ndarray) -> 'Batches':
    """See `BatchSource.of_rows`; other rows are padding."""
    source = copy.copy(self)
    source._own_rows = rows
    return source

  def eval_batches(self) -> Iterator[Batch]:
    """Yields batches with every example once, in order, task after task.

    Rows are never packed, so that row r of batch b is example
    b * batch_size + r. The last batch is filled up with rows of padding, whose
    loss weights are zero. Tasks with noise draw the same noise at each call.
    """
    rows = []
    for number, task in enumerate(self.tasks):
      for index in range(task.num_examples):
        rows.append([task.example(index, self._rng(number, 0, index))])
        if len(rows) == self.batch_size:
          yield self._make_batch(rows, self.feature_lengths)
          rows = []
    if rows:
      rows += [[]] * (self.batch_size - len(rows))
      yield self._make_batch(rows, self.feature_lengths)

  def num_eval_examples(self) -> int:
    """Returns the number of rows of all `eval_batches` that are not padding."""
    return sum(task.num_examples for task in self.tasks)

  def report(self) -> dict[str, dict[str, int]]:
    """Returns, by the name of each task, its report and its number of rows."""
    return {
      task.name: {**task.report(), 'rows': _num_rows(rows, task)}
      for task, rows in zip(self.tasks, self._rows, strict=True)
    }

  def epochs(self, num_steps: int) -> dict[str, float]:
    """See `BatchSource.epochs`; rates of a mixture hold on average."""
    shares = self._mixture.counts / sampling.BLOCK
    num_read = num_steps * self.batch_size * shares
    return {
      task.name: float(read) / _num_rows(rows, task)
      for task, rows, read in zip(self.tasks, self._rows, num_read, strict=True)
    }

  def _task_rows(
    self, number: int, ranks: np.ndarray
  ) -> Iterator[list[Example]]:
    """Yields rows of one task; `ranks` count its rows over all its epochs."""
    task, packed = self.tasks[number], self._rows[number]
    num_rows = _num_rows(packed, task)
    epochs, places = ranks // num_rows, ranks % num_rows
    rows = np.empty_like(ranks)
    for epoch in np.unique(epochs).tolist():
      here = epochs == epoch
      key = (self._seed, number, epoch)
      rows[here] = sampling.permute(places[here], num_rows, key)
    for row, epoch in zip(rows.tolist(), epochs.tolist(), strict=True):
      indices = [row] if packed is None else packed.examples(row).tolist()
      yield [
        task.example(index, self._rng(number, epoch, index))
        for index in indices
      ]

  def _rng(self, number: int, epoch: int, index: int) -> np.random.Generator:
    return np.random.default_rng([self._seed, number, epoch, index])

  def _pack(self, number: int) -> packing.PackedRows | None:
    if not self.pack:
      return None
    lengths = self.feature_lengths
    return packing.pack_rows(
      self.tasks[number].length_bounds(),
      lengths['inputs'],
      lengths['targets'],
      self._seed,
    )


@dataclasses.dataclass(frozen=True)
class _Side:
  """Tokens, segments and positions of one side, all <int32>[batch, length]."""

  tokens: np.ndarray
  segments: np.ndarray
  positions: np.ndarray

  @classmethod
  def fill(cls, rows: Sequence[Sequence[np.ndarray]], length: int) -> '_Side':
    tokens, segments, positions = np.zeros((3, len(rows), length), np.int32)
    for row, sequences in enumerate(rows):
      start = 0
      for segment, sequence in enumerate(sequences, start=1):
        end = start + len(sequence)
        tokens[row, start:end] = sequence
        segments[row, start:end] = segment
        positions[row, start:end] = np.arange(len(sequence))
        start = end
    return cls(tokens, segments, positions)


def make_batch(
  rows: Sequence[Sequence[Example]],
  feature_lengths: Mapping[str, int],
  segments: bool = False,
) -> Batch:
  """Pads rows of examples into one batch.

  Args:
    rows: the examples of each row; [] is a row of padding. The tokens of a row
      must fit the feature lengths.
    feature_lengths: number of tokens of 'inputs' and 'targets' in a row.
    segments: adds segment ids, which count from 1, and positions.

  Returns:
    The fields of a batch, <int32>[batch, length], but for the loss weights,
    which are <float32>[batch, length].
  """
  inputs = [[example[0] for example in row] for row in rows]
  targets = [[example[1] for example in row] for row in rows]
  encoder = _Side.fill(inputs, feature_lengths['inputs'])
  decoder = _Side.fill(targets, feature_lengths['targets'])
  shifted = np.zeros_like(decoder.tokens)
  shifted[:, 1:] = decoder.tokens[:, :-1]
  if segments:
    # Each segment begins with 0 instead of the EOS of the segment before. In a
    # row that is not packed, the EOS stands in the first place of padding, as
    # in seqio.
    ends = decoder.segments[:, 1:] != decoder.segments[:, :-1]
    shifted[:, 1:][ends] = 0
  batch = {
    'encoder_input_tokens': encoder.tokens,
    'decoder_input_tokens': shifted,
    'decoder_target_tokens': decoder.tokens,
    'decoder_loss_weights': (decoder.segments > 0).astype(np.float32),
  }
  if segments:
    batch |= {
      'encoder_segment_ids': encoder.segments,
      'encoder_positions': encoder.positions,
      'decoder_segment_ids': decoder.segments,
      'decoder_positions': decoder.positions,
    }
  return batch


def _num_rows(packed: packing.PackedRows | None, task: text_tasks.Task) -> int:
  return task.num_examples if packed is None else packed.num_rows


def _check_fit(
  task: text_tasks.Task, feature_lengths: Mapping[str, int]
) -> None:
  if not task.num_examples:
    raise ValueError(
      f'A task must have at least one example, but {task.name} has none '
      f'({task.report()}). Give it other data or longer feature lengths.'
    )
  longest = task.length_bounds().max(axis=0).tolist()
  limits = [feature_lengths.get(name, 0) for name in ('inputs', 'targets')]
  if longest[0] > limits[0] or longest[1] > limits[1]:
    raise ValueError(
      'Every example must fit the feature lengths, inputs '
      f'{limits[0]} and targets {limits[1]}, but those of {task.name} reach '
      f'{longest[0]} and {longest[1]}. Make the task with the same '
      'feature_lengths as the batches.'
    )
