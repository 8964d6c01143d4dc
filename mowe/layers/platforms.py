"""The platform that traced code is compiled for.

Some code depends on it while it is traced: how many experts a loop reads at a
time, whether there is a ragged all-to-all, the default dtype. Mostly a program
is compiled for the devices that are there, but see `compile_ahead`.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_asked_for: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'platform', default=None
)


def target() -> str:
  """Returns 'cpu', 'gpu' or 'tpu', the platform to trace for."""
  return _asked_for.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
  """Traces for another platform than that of the devices that are there.

  JAX does not know of this, and keeps what it has traced. So a function must
  not be traced for two platforms: make another `jax.jit` of it.

  Args:
    name: 'cpu', 'gpu' or 'tpu'.
  """
  token = _asked_for.set(name)
  try:
    yield
  finally:
    _asked_for.reset(token)
