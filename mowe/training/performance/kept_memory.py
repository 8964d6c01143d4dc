"""Keeps memory that this process frees, for its next use.

On a CPU, XLA asks for the temporaries of every step anew and frees them after
it. The C library returns large pieces to the operating system, which fills them
with zeros when they are touched again: a quarter of the time of a step
(`python -m benchmarks.freed_memory`). On an accelerator, JAX keeps the memory
of the device itself.
"""

import ctypes
import importlib.metadata
import importlib.util
import os

# Parameters of glibc's `mallopt`, and their values: nothing is returned, no
# piece is mapped by itself, and all threads share one heap.
_SETTINGS = {
  'M_TRIM_THRESHOLD': (-1, -1),
  'M_MMAP_MAX': (-4, 0),
  'M_ARENA_MAX': (-8, 1),
}


def keep_on_cpu() -> bool:
  """Makes the C library keep freed memory, if JAX will run on the CPU.

  Call it before JAX starts its threads, whose heaps would return memory. The
  process may then hold up to twice the memory at its peak, as free pieces lie
  between others.

  What the user has set in the environment, with names that begin with MALLOC_
  or with GLIBC_TUNABLES, is left alone. A C library other than glibc has no
  such setting.

  Returns:
    Whether memory is kept.
  """
  if _may_have_accelerator() or _is_set_by_user():
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:
    return False
  return all(mallopt(*setting) == 1 for setting in _SETTINGS.values())


def _may_have_accelerator() -> bool:
  if os.environ.get('JAX_PLATFORMS') == 'cpu':
    return False
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return bool(plugins) or importlib.util.find_spec('libtpu') is not None


def _is_set_by_user() -> bool:
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  return 'glibc.malloc' in tunables or any(
    name.startswith('MALLOC_') for name in os.environ
  )
