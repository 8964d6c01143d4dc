"""Keeps the memory that a benchmark's steps give back.

On a CPU, XLA asks for the temporaries of every step anew and gives them back
after it. The C library hands large pieces to the operating system, which fills
them with zeros when they are touched again: a seventh of a step and more (see
docs/results/speed.md), and the least repeatable part of it. On an accelerator,
memory is kept, and therefore the timed contenders of a benchmark keep it, too.
"""

import os
import sys

_VARIABLE = 'GLIBC_TUNABLES'
# With these settings of the C library, nothing is given back, and all threads
# share one heap with large pages.
_SETTINGS = {
  'mmap_max': 0,
  'trim_threshold': 2**62,
  'arena_max': 1,
  'hugetlb': 1,
}


def keep() -> None:
  """Starts this process again with these settings, once.

  They are read when a process starts. A C library other than glibc (2.35 or
  newer, for large pages) ignores them. What the user has set comes later, and
  counts.
  """
  given = os.environ.get(_VARIABLE, '')
  ours = ':'.join(f'glibc.malloc.{name}={v}' for name, v in _SETTINGS.items())
  if ours in given or sys.platform != 'linux':
    return
  os.environ[_VARIABLE] = f'{ours}:{given}' if given else ours
  sys.stdout.flush()
  os.execv(sys.executable, sys.orig_argv)
