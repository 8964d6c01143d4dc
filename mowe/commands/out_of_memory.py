"""Says in a sentence that there was not enough memory."""

import collections
import re

import jax

# JAX says in words what could not be allocated, in bytes or with a unit.
_SIZE = re.compile(r'allocat\w*\s+([\d.]+)\s?(bytes|[KMGT]i?B)', re.IGNORECASE)

# Arrays of fewer bytes than this are no reason, and more kinds are hard to read.
_SMALL, _SHOWN = 50_000_000, 3


def explanation(error: MemoryError | RuntimeError) -> str | None:
  """Returns what happened and what to do; None for an error of another kind.

  Args:
    error: a MemoryError, or the error that JAX raises in its place.
  """
  text = str(error)
  if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in text:
    return None
  found = _SIZE.search(text)
  size = 'more of it'
  if found:
    size, unit = found.groups()
    size = f'{int(size) / 1e9:.2f} GB' if unit == 'bytes' else f'{size} {unit}'
  first = (text.splitlines() or [''])[0]
  return (
    'The memory must hold what a command works on, such as a model, the state '
    f'of its optimizer and a batch, but allocating {size} failed ({first}). '
    f'{_largest()}In '
    'training, take a smaller BATCH_SIZE, more NUM_MICROBATCHES or a smaller '
    'model (VOCAB_SIZE, NUM_EXPERTS, EXPERT_DIM); experts may also lie on disk '
    '(gin_configs/stores/disk.gin).'
  )


def _largest() -> str:
  """A sentence with the largest arrays of JAX, by their shapes, or ''.

  The error keeps the functions that it ended, and so their arrays.
  """
  found = collections.Counter(
    (array.addressable_shards[0].data.nbytes, f'{array.dtype}{[*array.shape]}')
    for array in jax.live_arrays()
    if not array.is_deleted() and array.addressable_shards
  )
  largest = [
    f'{number} of {shape} with {bytes_of_one / 1e9:.2f} GB on each device'
    for (bytes_of_one, shape), number in sorted(found.items(), reverse=True)
    if bytes_of_one >= _SMALL
  ]
  if not largest:
    return ''
  return f'The largest arrays there were {", ".join(largest[:_SHOWN])}. '
