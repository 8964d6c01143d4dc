"""Keeps compiled programs in the user's cache, for later runs.

A run that is continued, a second seed and a second question start without
compiling what was compiled before. JAX finds a program by all that it depends
on, and the results have the same bits.
"""

import hashlib
import os
import pathlib
import platform

# JAX deletes programs that were not used for the longest time beyond this. It
# looks at all of them when it writes one, so there must not be too many.
_MOST_BYTES = 2**30
# Of the 22 programs of a small run, 8 take longer to compile. A second start
# took 6.3 s of a core with these, 5.6 s with all, and 6.8 s with those of 0.2 s.
_LEAST_SECONDS = 0.1


def use() -> None:
  """Tells JAX, before it is imported, where compiled programs are kept.

  Settings of the user's own in the environment are left alone. Without a folder
  that can be written, programs are compiled again each time.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  folder = _folder()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  for name, value in (
    ('JAX_COMPILATION_CACHE_MAX_SIZE', _MOST_BYTES),
    ('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', _LEAST_SECONDS),
  ):
    os.environ.setdefault(name, str(value))


def _folder() -> pathlib.Path:
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  # A home folder may be shared by machines, and a program for one processor
  # does not run on every other.
  digest = hashlib.sha256(_processor().encode()).hexdigest()[:12]
  return pathlib.Path(cache) / 'mowe' / 'programs' / digest


def _processor() -> str:
  """Architecture and features of the processor, as far as they are known."""
  known = [platform.machine(), platform.processor()]
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  for line in lines:
    if line.startswith(('flags', 'Features')):
      return ' '.join([*known, line])
  return ' '.join(known)
