"""Settings of all tests, such as eight virtual CPU devices; shared fixtures."""

import ctypes
import dataclasses
import gc
import os
import pathlib
import zipfile

# If a test loads TensorFlow, it must neither print messages nor take a GPU.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax
import pytest
from jax._src import compiler

from mowe.training.performance import kept_memory

# Tracing makes many objects and few cycles, so that most searches find nothing.
gc.set_threshold(50_000, 20, 100)

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# See `quick_compilation`; set here for fixtures that several tests share.
jax.config.update('jax_disable_most_optimizations', True)

pytest_plugins = ['small_runs']

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
  parser.addoption(
    '--slow', action='store_true', help='also run the tests marked slow'
  )
  parser.addoption(
    '--golden_dir',
    default=str(_ROOT / 'tests' / 'golden'),
    help='folder of <name>.npz, <name>.json and hf_switch_* for tests/parity',
  )


def pytest_collection_modifyitems(config, items):
  if config.getoption('--slow') or config.getoption('-m'):
    return
  skip = pytest.mark.skip(reason='slow: run with --slow')
  for item in items:
    if 'slow' in item.keywords:
      item.add_marker(skip)


def _known(options):
  """Those of XLA's options that the installed version has."""
  known = {}
  for name, value in options.items():
    try:
      jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
      continue
    known[name] = value
  return known


# XLA's newer emitters of fusions take two to three times as long to compile as
# the older ones, which jaxlib 0.12 no longer has. Several threads for one small
# program take longer, too. `_known` compiles the first programs of this process,
# so that it has read its own XLA_FLAGS by now: those that are set for other
# processes below change nothing here.
_QUICK_OPTIONS = _known(
  {
    'xla_cpu_use_fusion_emitters': False,
    'xla_cpu_parallel_codegen_split_count': 1,
  }
)
# The same for processes that tests start.
_QUICK_ENVIRONMENT = {
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  'XLA_FLAGS': ' '.join(
    f'--{name}={value}'.lower() for name, value in _QUICK_OPTIONS.items()
  ),
}


def _with_quick_options(get_compile_options):
  """JAX has no setting for options of all programs, so its function is wrapped."""

  def options(*args, **kwargs):
    options = get_compile_options(*args, **kwargs)
    debug_options = options.executable_build_options.debug_options
    if debug_options.xla_backend_optimization_level == 0:
      options.env_option_overrides += list(_QUICK_OPTIONS.items())
    return options

  return options


compiler.get_compile_options = _with_quick_options(compiler.get_compile_options)


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(pytestconfig):
  """Compiles programs once that several tests, workers or runs use.

  They are in the cache of pytest; `pytest --cache-clear` removes them.
  """
  settings = {
    'jax_compilation_cache_dir': str(pytestconfig.cache.mkdir('programs')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': 0,
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, value in settings.items():
      jax.config.update(name, value)
      # The environment passes the setting on to processes that tests start.
      patch.setenv(name.upper(), str(value))
    for name, value in _QUICK_ENVIRONMENT.items():
      patch.setenv(name, value)
    yield


@pytest.fixture(scope='session', autouse=True)
def memory_of_its_own():
  """Verbs called in this process leave its memory as it is.

  Some tests measure that memory. Processes that tests start keep theirs.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(kept_memory, 'keep_on_cpu', lambda: False)
    yield


@pytest.fixture(autouse=True)
def quick_compilation(request, monkeypatch):
  """Compiles with little optimization, as most programs run only a few steps.

  This changes machine code, but neither HLO nor buffers (see
  test_quick_compilation.py). A test that compares bits across programs has the
  mark `optimized`, and gets the machine code that users get.
  """
  is_quick = request.node.get_closest_marker('optimized') is None
  jax.config.update('jax_disable_most_optimizations', is_quick)
  if not is_quick:
    for name in _QUICK_ENVIRONMENT:
      monkeypatch.delenv(name)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


_MOST_RESIDENT = 3 * 2**30


@pytest.fixture(scope='module', autouse=True)
def release_programs():
  """Forgets compiled programs after a file, if the process has become large.

  Those of all files together would take more than 10 GB of memory. What another
  file needs again is read from the cache of programs.

  The C library keeps freed memory unless it is told to return it. Without that,
  the process would stay large, and programs be forgotten after every file.
  """
  yield
  status = pathlib.Path('/proc/self/statm')
  pages = int(status.read_text().split()[1]) if status.exists() else None
  if pages is None or pages * os.sysconf('SC_PAGE_SIZE') > _MOST_RESIDENT:
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
      trim(0)


@pytest.fixture(scope='session')
def golden_dir() -> pathlib.Path:
  return _ROOT / 'tests' / 'golden'


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """The folder of real data beside the checkout; tests skip if it is absent."""
  folder = _ROOT.parent / 'shared' / 'data'
  if not folder.is_dir():
    pytest.skip('needs the folder ../shared/data beside the checkout')
  return folder


@dataclasses.dataclass(frozen=True)
class T5xGolden:
  """Unpacks checkpoints that the real t5x wrote.

  Call: 'legacy' or 'orbax' to a new copy of the folder of that run.
  """

  folder: pathlib.Path
  place: pathlib.Path

  def __call__(self, name: str) -> pathlib.Path:
    out = self.place / name
    if not out.exists():
      with zipfile.ZipFile(self.folder / f'{name}.zip') as packed:
        packed.extractall(out)
    return out


@pytest.fixture
def t5x_golden(golden_dir, tmp_path_factory) -> T5xGolden:
  return T5xGolden(golden_dir / 't5x', tmp_path_factory.mktemp('t5x'))
