"""Says in a sentence that there was not enough memory."""

import re

# JAX says in words what could not be allocated, in bytes or with a unit.
_SIZE = re.compile(r'allocat\w*\s+([\d.]+)\s?(bytes|[KMGT]i?B)', re.IGNORECASE)


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
    f'of its optimizer and a batch, but allocating {size} failed ({first}). In '
    'training, take a smaller BATCH_SIZE, more NUM_MICROBATCHES or a smaller '
    'model (VOCAB_SIZE, NUM_EXPERTS, EXPERT_DIM); experts may also lie on disk '
    '(gin_configs/stores/disk.gin).'
  )
