"""Tests the rooms of the package: their sizes, arrows, imports, and tests."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGE = _ROOT / 'mowe'
_HEAVY = ('tensorflow', 'tensorflow_datasets', 'seqio', 't5x', 'torch')

# For each room, the rooms that it may import besides itself, from the bottom
# up. Inner rooms are listed separately below.
_MODELS = ('models', 'layers', 'words')
_RUNS = ('interop', 'stores', 'training', 'data', *_MODELS)
_ARROWS = {
  'words': (),
  'layers': ('words',),
  'models': ('layers', 'words'),
  'training': _MODELS,
  'stores': ('training', *_MODELS),
  'interop': ('training', *_MODELS),
  'data': ('words',),
  'evaluation': ('data', *_MODELS),
  'model_folders': _RUNS,
  'commands': ('model_folders', 'evaluation', *_RUNS),
  'comparison': ('commands', 'model_folders', 'evaluation', *_RUNS),
}
_MOST_FILES = 16


def _files(package):
  return sorted((_PACKAGE / package).rglob('*.py'))


def _imports(path):
  """All modules that a file imports anywhere: `a.b` for `from a import b`."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path} has a relative import'
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def _rooms_of(path):
  return {
    name.split('.')[1] for name in _imports(path) if name.startswith('mowe.')
  }


def _outer(path):
  names = {name.split('.')[0] for name in _imports(path)}
  return names - set(sys.stdlib_module_names) - {'mowe'}


def _module_graph():
  """For each module, those of the package that it imports, even lazily."""
  modules = {
    '.'.join(path.relative_to(_ROOT).with_suffix('').parts): path
    for path in _PACKAGE.rglob('*.py')
    if path.name != '__init__.py'
  }
  graph = {}
  for name, path in modules.items():
    found = set(_imports(path))
    # The import `from a.b import c` may load the module a.b or the module
    # a.b.c.
    found |= {one.rpartition('.')[0] for one in found}
    graph[name] = found & modules.keys()
  return graph


@pytest.mark.parametrize('package', _ARROWS)
def test_arrows_point_down(package):
  files = _files(package)
  assert files
  for path in files:
    wrong = _rooms_of(path) - {package, *_ARROWS[package]}
    assert not wrong, f'{path} imports {wrong}'


def test_every_room_has_its_arrows():
  rooms = {path.parent.name for path in _PACKAGE.glob('*/__init__.py')}
  # Only the command line may import everything.
  assert rooms - {'cli'} == set(_ARROWS)


def test_no_room_is_crowded():
  for folder in {path.parent for path in _PACKAGE.rglob('*.py')}:
    files = list(folder.glob('*.py'))
    assert len(files) <= _MOST_FILES, f'{folder} has {len(files)} files'


def test_no_import_circles():
  graphlib.TopologicalSorter(_module_graph()).prepare()


def test_inner_rooms_have_no_circles():
  graph = {}
  for module, imported in _module_graph().items():
    room = module.rpartition('.')[0]
    others = {name.rpartition('.')[0] for name in imported} - {room}
    graph.setdefault(room, set()).update(others)
  graphlib.TopologicalSorter(graph).prepare()


def test_tests_stand_where_their_modules_do():
  """tests/<room>/test_<module>*.py must test mowe/<room>/<module>.py."""
  tests = _ROOT / 'tests'
  for path in tests.rglob('test_*.py'):
    room = _PACKAGE / path.parent.relative_to(tests)
    if path.parent == tests or not room.is_dir():
      # These are tests of gin files, of documents and of reference
      # implementations.
      continue
    tested = path.stem.removeprefix('test_')
    assert any(
      tested.startswith(module.stem) for module in room.glob('*.py')
    ), f'{path} is named after no module of {room}'


def test_words_import_numpy_and_sentencepiece_only():
  for path in _files('words'):
    assert _outer(path) <= {'numpy', 'sentencepiece'}, path


@pytest.mark.parametrize(
  'package',
  ['words', 'layers', 'models', 'training', 'stores', 'evaluation'],
)
def test_heavy_packages_stay_out(package):
  for path in _files(package):
    assert not _outer(path) & {*_HEAVY, 'gin'}, path


def test_gin_and_tensorflow_have_one_place_each():
  gin, tensorflow = set(), set()
  for path in _PACKAGE.rglob('*.py'):
    name = path.relative_to(_PACKAGE).as_posix()
    if 'gin' in _outer(path):
      gin.add(name)
    if _outer(path) & set(_HEAVY):
      tensorflow.add(name)
  assert gin == {
    'commands/gin_files/gin_config.py',
    'commands/gin_files/gin_check.py',
    'commands/gin_files/gin_order.py',
    'commands/gin_files/gin_types.py',
  }
  assert {n for n in tensorflow if not n.startswith('interop/')} <= {
    'data/seqio_stream.py'
  }


def _run(code, *arguments, timeout=300):
  """Runs code in a fresh process, and returns what it printed."""
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=timeout,
    cwd=_ROOT,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def test_importing_mowe_is_quick():
  seconds = _run("""
    import time
    import jax
    start = time.process_time()
    import mowe
    print(time.process_time() - start)
  """)
  assert float(seconds) < 2


@pytest.mark.slow
def test_the_core_loads_nothing_heavy():
  loaded = _run("""
    import sys
    from mowe.cli import main
    from mowe.commands import train, evaluate, infer, ask, cache_task
    from mowe.data import batch_source
    from mowe.models import decoding
    heavy = ('tensorflow', 'tensorflow_datasets', 'seqio', 't5x', 'torch', 'gin')
    print([name for name in heavy if name in sys.modules])
  """)
  assert loaded.strip() == '[]'


def test_help_needs_no_jax():
  loaded = _run("""
    import contextlib
    import sys
    from mowe.cli import main
    with contextlib.suppress(SystemExit):
      main.main(['--help'])
    print('jax' in sys.modules)
  """)
  assert loaded.strip().endswith('False')


@pytest.mark.slow
def test_a_step_and_an_answer_with_tensorflow_blocked(tmp_path):
  """Makes a cache of text, trains a step, and generates an answer."""
  printed = _run(
    """
    import functools, json, pathlib, sys
    for name in ('tensorflow', 'seqio', 'tensorflow_datasets', 'gin', 't5x'):
      sys.modules[name] = None
    import jax
    jax.config.update('jax_platforms', 'cpu')
    from mowe.commands import ask, cache_task, data_config, train
    from mowe.layers.memory import word_experts
    from mowe.models.t5 import t5_config
    from mowe.training.optimization import optimizers, row_optimizers
    from mowe.words import subword_vocabularies, vocabulary_builder

    folder = pathlib.Path(sys.argv[1])
    texts = [f'Zorblat of town {n} met Quimby.' for n in range(30)]
    file = folder / 'text.jsonl'
    file.write_text(''.join(json.dumps({'text': t}) + '\\n' for t in texts))
    vocabulary = subword_vocabularies.load_subwords('bytes')
    routing, _ = vocabulary_builder.build_routing_vocabulary(
      texts, vocabulary, num_words=9, num_experts=8, num_skipped=2
    )
    source = cache_task.TextFiles([str(file)])
    cache_task.cache_task(folder / 'cache' / 'text', 'bytes', source)
    training = train.Training(
      model=t5_config.T5Config(
        384, 8, 2, 3, 9, 1, 1,
        sparse_feed_forward=functools.partial(word_experts.MoweLayer, 8, 4),
        sparse_encoder_layers=(0,),
        sparse_decoder_layers=(0,),
        routing=routing,
      ),
      vocabulary=vocabulary,
      data=data_config.DataConfig(
        'text', {'inputs': 24, 'targets': 12}, 4, str(folder / 'cache')
      ),
      model_dir=str(folder / 'run'),
      total_steps=1,
      optimizer=optimizers.AdamW(1e-3),
      row_optimizer=row_optimizers.RowAdafactor(1e-3),
    )
    train.train(training)
    answer = ask.Answerer(str(folder / 'run'), max_length=4)
    ask.converse(answer, ['Who met Quimby?'], explain=True)
    print('answered', [name for name in sys.modules if name == 'tensorflow'
                       and sys.modules[name] is not None])
    """,
    tmp_path,
  )
  assert 'answered []' in printed and 'Finished step 1' in printed


def _also_tested(path):
  """The modules that the docstring of a test file names after `Also tests`."""
  said = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
  assert said, f'{path} does not say what it tests'
  return set(re.findall(r'`(\w+)`', said.partition('Also tests ')[2]))


def test_every_module_is_named_by_its_tests():
  """A module has a test file of its name, or one whose docstring names it."""
  modules = {path.stem for path in _PACKAGE.rglob('*.py')} - {'__init__'}
  found = set()
  for path in sorted((_ROOT / 'tests').rglob('test_*.py')):
    also = _also_tested(path)
    assert also <= modules, f'{path} names what is not there: {also - modules}'
    found |= also | {path.stem.removeprefix('test_')}
  lost = sorted(modules - found)
  assert not lost, f'no docstring under tests/ names the modules {lost}'
