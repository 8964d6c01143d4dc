"""Says which process of a run was lost, when the others cannot go on."""

import contextlib
import re
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

# The processes that are left find out at about the same time. It is less than
# the time after which JAX ends them itself.
_WAIT_SECONDS = 10


class ProcessLostError(RuntimeError):
  """Another process of the run died, or does not answer."""


@contextlib.contextmanager
def named() -> Iterator[None]:
  """Turns an error that may come of a lost process into one that names it.

  An error of this process alone, such as too little memory, stays what it is.

  Raises:
    ProcessLostError: JAX raised an error, and not all processes are there.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      raise
    barrier = ocp.multihost.get_barrier_sync_fn()
    try:
      barrier(key='after an error', timeout_ms=_WAIT_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as missing:
      first = str(error).partition('\n')[0]
      raise ProcessLostError(
        'All processes of a run must go on together, but '
        f'{_names(str(missing))} of {jax.process_count()} did not answer within '
        f'{_WAIT_SECONDS} seconds of an error here ({first}). Look at the last '
        'lines of its output, and start all processes again: the run goes on '
        'from its newest checkpoint.'
      ) from error
    # All processes are there, so the error has another cause.
    raise


def _names(message: str) -> str:
  """The processes that a barrier of JAX says it missed."""
  listed = re.search(r'task names:\n((?:.*\d+\n)+)', message)
  found = re.findall(r'(\d+)$', listed[1], re.M) if listed else []
  found = found or re.findall(r'\b[Tt]ask:? ?(\d+) heartbeat', message)
  if not found:
    return 'another process'
  many = 'es' if len(found) > 1 else ''
  return f'process{many} {", ".join(sorted(set(found), key=int))}'
