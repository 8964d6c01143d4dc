"""Traces some steps of a run with JAX's profiler."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

# The first step compiles its program, and the second one still fills buffers.
_NUM_BEFORE = 2


class ProfiledStep:
  """A train step that traces some of its first calls.

  The folder can be opened with xprof (`xprof --logdir`), TensorBoard's profile
  plug-in, or, the file `*.trace.json.gz` in it, with Perfetto.

  Args:
    train_step: the step; see `loop.run`.
    folder: where the trace is written.
    num_steps: how many calls are traced, from the third on. A run that ends
      before has a trace of those it did.

  Call: calls the step.
  """

  def __init__(
    self,
    train_step: Callable[..., tuple[Any, Any]],
    folder: pathlib.Path,
    num_steps: int,
  ):
    self._train_step = train_step
    self._folder = folder
    self._end = _NUM_BEFORE + num_steps
    self._num_done = 0
    self._is_tracing = False
    self._metrics = None

  def __call__(self, *arguments: Any) -> tuple[Any, Any]:
    if self._num_done == _NUM_BEFORE:
      # What the device still does belongs to the steps before.
      jax.block_until_ready(self._metrics)
      jax.profiler.start_trace(self._folder)
      self._is_tracing = True
    with jax.profiler.StepTraceAnnotation('train', step_num=self._num_done):
      state, self._metrics = self._train_step(*arguments)
    self._num_done += 1
    if self._num_done == self._end:
      self.close()
    return state, self._metrics

  def close(self) -> None:
    """Ends the trace and writes it, if there is one."""
    if self._is_tracing:
      self._is_tracing = False
      jax.block_until_ready(self._metrics)
      jax.profiler.stop_trace()
      print(
        f'Traced steps: {self._num_done - _NUM_BEFORE}. The trace is in '
        f'{self._folder}.',
        flush=True,
      )
