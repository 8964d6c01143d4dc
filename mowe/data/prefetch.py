"""Prefetching makes the next batches in threads while a step runs."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterator
from typing import Any


class Prefetcher:
  """Iterates over `transform(batches(step))`, made ahead in the background.

  Batches come in the order of steps, whatever the number of threads and the
  depth, because every batch is a function of its step. An exception in the
  background is raised where its batch would have come. Use a prefetcher as a
  context manager, or `close` it.

  Args:
    batches: function that makes the batch of a step; it is called in several
      threads at once.
    first_step: step of the first batch.
    last_step: step before which iteration ends; None never ends.
    transform: function that is applied to each batch in the background, for
      example to plan experts; None applies nothing.
    depth: number of batches that are ready or being made ahead of the consumer.
    num_threads: number of threads that make batches.

  Raises:
    ValueError: depth or num_threads is below 1.
  """

  def __init__(
    self,
    batches: Callable[[int], Any],
    first_step: int = 0,
    last_step: int | None = None,
    transform: Callable[[Any], Any] | None = None,
    depth: int = 2,
    num_threads: int = 1,
  ):
    if depth < 1 or num_threads < 1:
      raise ValueError(
        'Prefetching needs a depth and num_threads of at least 1, but they '
        f'are {depth} and {num_threads}. Without prefetching, call '
        'batches(step) yourself.'
      )
    self._make = batches
    self._transform = transform
    num_steps = None if last_step is None else max(0, last_step - first_step)
    self._steps = itertools.islice(itertools.count(first_step), num_steps)
    self._pool = concurrent.futures.ThreadPoolExecutor(
      num_threads, thread_name_prefix='prefetch'
    )
    self._waiting: collections.deque = collections.deque()
    self._closed = False
    for step in itertools.islice(self._steps, depth):
      self._submit(step)

  def __iter__(self) -> Iterator[Any]:
    return self

  def __next__(self) -> Any:
    if self._closed or not self._waiting:
      self.close()
      raise StopIteration
    future = self._waiting.popleft()
    for step in itertools.islice(self._steps, 1):
      self._submit(step)
    try:
      return future.result()
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Stops: batches being made are waited for, others are never begun."""
    self._closed = True
    self._waiting.clear()
    self._pool.shutdown(wait=True, cancel_futures=True)

  def __enter__(self) -> 'Prefetcher':
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def _submit(self, step: int) -> None:
    self._waiting.append(self._pool.submit(self._work, step))

  def _work(self, step: int) -> Any:
    batch = self._make(step)
    return batch if self._transform is None else self._transform(batch)
