"""Tests the check of a token cache in the background of a run."""

import threading

import pytest

from mowe.data.caches import cache_verification


class _Cache:
  """A cache whose verification waits until it is told to end."""

  def __init__(self, error=None):
    self.error = error
    self.may_end = threading.Event()
    self.is_begun = threading.Event()

  def verify(self, is_over):
    self.is_begun.set()
    while not self.may_end.wait(0.01):
      if is_over():
        return
    if self.error is not None:
      raise self.error


def test_a_run_waits_for_the_outcome():
  good, bad = _Cache(), _Cache(ValueError('targets.bin has changed'))
  with cache_verification.Verification([good, bad]) as verification:
    assert good.is_begun.wait(5) and not bad.is_begun.is_set()
    good.may_end.set()
    bad.may_end.set()
    with pytest.raises(ValueError, match='has changed'):
      verification.wait()


def test_a_run_that_ends_early_does_not_wait():
  cache = _Cache()
  with cache_verification.Verification([cache]):
    assert cache.is_begun.wait(5)


def test_what_is_verified_is_verified_once():
  cache = _Cache()
  cache.may_end.set()
  with cache_verification.Verification([cache]) as verification:
    verification.wait()
    cache.verify = None
    verification.wait()
