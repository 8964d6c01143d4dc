"""Compares the files of token caches with their digests while a run goes on."""

import concurrent.futures
import threading
from collections.abc import Sequence

from mowe.data.caches import token_cache


class Verification:
  """Verifies token caches in a thread; a context manager.

  A run begins at once, and waits for the outcome before it saves anything: so
  nothing that was trained on damaged tokens is kept.

  Args:
    caches: the caches, each of which is read once as a whole.
  """

  def __init__(self, caches: Sequence[token_cache.TokenCache]):
    self._is_over = threading.Event()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'verify')
    self._verified = [
      self._thread.submit(cache.verify, self._is_over.is_set)
      for cache in caches
    ]

  def __enter__(self) -> 'Verification':
    return self

  def __exit__(self, *unused_exception: object) -> None:
    self._is_over.set()
    self._thread.shutdown()

  def wait(self) -> None:
    """Waits until all caches are verified.

    Raises:
      ValueError: a file is not what it was when the cache was built.
    """
    for one in self._verified:
      one.result()
    self._verified = []
