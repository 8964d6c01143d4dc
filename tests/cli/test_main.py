"""Tests the `mowe` command in this process: every verb, and its errors.

Also tests `build_routing_vocabulary`, `data_verbs`, `experiment_verbs`,
`gin_arguments`, `model_verbs`, `modules_verbs`, `quickstart`, `show_progress`,
`train_vocabulary`, and `verb_parsers`.
"""

import argparse
import inspect
import json
import os
import pathlib
import re
import shlex

import numpy as np
import pytest
import small_runs

from mowe.cli import gin_arguments, main
from mowe.commands import ask, train, train_vocabulary
from mowe.commands.gin_files import gin_config
from mowe.comparison import quickstart
from mowe.training import train_metrics
from mowe.words import placement, routing_vocabulary, subword_vocabularies


@pytest.fixture(scope='module')
def trained(world, tmp_path_factory):
  """A model after a few steps of training, and a gin file of its questions."""
  folder = tmp_path_factory.mktemp('trained') / 'run'
  world.train(folder, 1)
  return str(folder)


def _run(*arguments):
  return main.main([str(argument) for argument in arguments])


def _refused(capsys, *arguments):
  """Runs a command that must fail with one paragraph, no trace and status 1."""
  capsys.readouterr()
  assert _run(*arguments) == 1
  text = capsys.readouterr().err
  assert text.startswith('mowe: ') and 'Traceback' not in text
  assert '\n\n' not in text and 'In call to configurable' not in text
  assert ' 0x' not in text
  return text


def _gin(**macros):
  return [f'--gin.{name}={value!r}' for name, value in macros.items()]


def _training(world, model_dir, *more, model='mowe', **macros):
  macros = {
    'VOCABULARY_PATH': world.vocabulary_path,
    'MODEL_DIR': str(model_dir),
    'CACHE_DIR': world.cache_dir,
    'MIXTURE_OR_TASK_NAME': 'text',
    'TASK_FEATURE_LENGTHS': small_runs.LENGTHS,
    'TRAIN_STEPS': 2,
    'WARMUP_STEPS': 1,
    'BATCH_SIZE': 8,
  } | macros
  if model == 'mowe':
    macros.setdefault('ROUTING_VOCABULARY', world.routing_path)
  return [
    'train',
    f'--gin_file=gin_configs/examples/text_pretrain_{model}.gin',
    *_gin(**macros),
    *more,
  ]


# These tests read gin files and check their values; nothing is compiled.


def test_help_lists_the_verbs(capsys):
  with pytest.raises(SystemExit) as stopped:
    _run('--help')
  assert stopped.value.code == 0
  shown = capsys.readouterr().out
  for verb in ('train', 'evaluate', 'infer', 'ask', 'explain', 'cache-task',
               'build-routing-vocabulary', 'train-vocabulary', 'convert', 'inspect',
               'quickstart', 'compare'):  # fmt: skip
    assert verb in shown


def test_every_verb_has_a_description_and_an_example_that_can_be_typed():
  parser = main._make_parser()
  (verbs,) = [
    action.choices
    for action in parser._actions
    if isinstance(action, argparse._SubParsersAction)
  ]
  for name, verb in verbs.items():
    assert verb.description.endswith('.'), name
    start, example = verb.epilog.split('\n', 1)
    assert start == 'example:'
    for command in example.replace('\\\n', ' ').splitlines():
      program, *arguments = shlex.split(command)
      assert program == 'mowe' and arguments[0] == name
      options, rest = parser.parse_known_args(arguments)
      gin_arguments.take_bindings(rest)
      assert not rest, command
      for file in getattr(options, 'gin_file', []):
        assert pathlib.Path(file).is_file(), file


@pytest.mark.parametrize(
  'arguments',
  [[], ['fly'], ['train', '--gin_fil', 'x', '--wings=2'], ['ask', 'm', '--up']]
  + [['train', '--profile', '0']],
)
def test_unknown_arguments_are_refused(arguments, capsys):
  with pytest.raises(SystemExit) as stopped:
    _run(*arguments)
  assert stopped.value.code != 0
  assert 'usage: mowe' in capsys.readouterr().err


def test_a_binding_needs_a_value():
  with pytest.raises(SystemExit, match='must be --gin.NAME=VALUE'):
    _run('train', '--gin.BATCH_SIZE', '8')


@pytest.mark.slow
def test_a_dry_run_prints_the_model_and_writes_nothing(world, tmp_path, capsys):
  assert _run(*_training(world, tmp_path / 'run', '--dry_run')) == 0
  shown = capsys.readouterr().out
  experts = small_runs.NUM_EXPERTS * 3 * 64 * 128
  assert f'{experts:,}' in shown and f'{3 * 64 * 128:,}' in shown
  assert 'encoder_input_tokens (8, 18)' in shown
  assert not (tmp_path / 'run').exists()


def test_a_file_that_is_not_there(capsys):
  text = _refused(capsys, 'train', '--gin_file=absent.gin')
  assert 'absent.gin' in text and '--gin_search_paths' in text


def test_a_misspelt_name_in_a_file(tmp_path, capsys):
  path = tmp_path / 'own.gin'
  path.write_text(
    'from __gin__ import dynamic_registration\n'
    'from mowe.models.t5 import t5_config\n'
    't5_config.T5Config.mlp_dimm = 3\n'
  )
  text = _refused(capsys, 'train', f'--gin_file={path}')
  assert 'mlp_dimm' in text and 'own.gin' in text and 'line 3' in text


def test_a_misspelt_macro(world, tmp_path, capsys):
  text = _refused(capsys, *_training(world, tmp_path / 'run', TRAIN_STEP=3))
  assert 'TRAIN_STEP ' in text and 'Did you mean TRAIN_STEPS?' in text


def test_versions(capsys):
  with pytest.raises(SystemExit) as stopped:
    _run('--version')
  assert stopped.value.code == 0
  assert re.match(
    r'mowe [\d.]+, Python 3\.\d+\.\d+, jax \d', capsys.readouterr().out
  )


def test_completion_knows_verbs_and_options(capsys):
  with pytest.raises(SystemExit) as stopped:
    _run('--print_completion', 'bash')
  assert stopped.value.code == 0
  script = capsys.readouterr().out
  for name in ('build-routing-vocabulary', '--extra_ids', 'prune'):
    assert name in script


def test_a_dry_run_looks_for_the_first_weights(world, tmp_path, capsys):
  file = 'gin_configs/examples/text_finetune_t5.gin'
  macros = {
    'VOCABULARY_PATH': world.vocabulary_path,
    'CACHE_DIR': world.cache_dir,
    'MIXTURE_OR_TASK_NAME': 'questions',
    'MODEL_DIR': str(tmp_path / 'run'),
    'INITIAL_CHECKPOINT_PATH': str(tmp_path / 'nowhere'),
    'BATCH_SIZE': 8,
  }
  text = _refused(
    capsys, 'train', f'--gin_file={file}', *_gin(**macros), '--dry_run'
  )
  assert 'nowhere must hold a checkpoint' in text
  assert not list(tmp_path.iterdir())


def test_missing_macros_are_named(capsys):
  file = 'gin_configs/examples/text_pretrain_t5.gin'
  text = _refused(capsys, 'train', f'--gin_file={file}', *_gin(MODEL_DIR='a'))
  assert 'MIXTURE_OR_TASK_NAME, VOCABULARY_PATH' in text


@pytest.mark.parametrize(
  ('macros', 'parts'),
  [
    ({'DTYPE': 'float16'}, ['float16', 'bfloat16', 'NaN']),
    ({'DTYPE': 'float99'}, ['must be float32 or bfloat16, but is float99']),
    ({'TASK_FEATURE_LENGTHS': {'input': 8, 'target': 8}},
     ["names 'inputs' and 'targets'", "'input': 8"]),
    ({'TASK_FEATURE_LENGTHS': {'targets': 8}}, ["Add 'inputs'"]),
    ({'BATCH_SIZE': 12}, ['data x expert x microbatches', 'Use 16']),
    ({'NUM_MICROBATCHES': 3}, ['8 x 1 x 3', 'Use 24']),
    ({'VOCAB_SIZE': 128}, ['vocab_size', '140', '128', 'Set it to 256']),
    ({'NUM_EXPERTS': 17}, ['17', '16', '--num_experts']),
    ({'ROUTING_VOCABULARY': '/absent.npz'}, ['/absent.npz']),
    ({'VOCABULARY_PATH': '/absent.model'}, ['/absent.model', 'bytes']),
    ({'MIXTURE_OR_TASK_NAME': 'absent'}, ['cache/absent', "'questions'", 'cache-task']),
    (
      {'TASK_FEATURE_LENGTHS': {'inputs': 3, 'targets': 1}},
      ['feature_lengths'],
    ),
    # The routing vocabulary, and then the cache, is for another subword
    # vocabulary.
    ({'VOCABULARY_PATH': 'bytes'}, ['built for', 'sha256']),
    ({'VOCABULARY_PATH': 'bytes', 'model': 't5'},
     ['vocabulary', 'cache']),
  ],
)  # fmt: skip
def test_parts_that_do_not_fit(world, tmp_path, capsys, macros, parts):
  arguments = _training(world, tmp_path / 'run', **macros)
  text = _refused(capsys, *arguments)
  for part in parts:
    assert part in text, text
  assert not (tmp_path / 'run').exists()


def test_folders_elsewhere_are_refused(
  world, trained, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  elsewhere = 'on a file system of this machine, but '
  text = _refused(capsys, *_training(world, 'gs://bucket/run', '--dry_run'))
  assert f'{elsewhere}gs://bucket/run names' in text
  to_safetensors = ('--to', 'safetensors')
  text = _refused(capsys, 'convert', trained, 's3://b/m', *to_safetensors)
  assert elsewhere in text
  text = _refused(
    capsys,
    *('cache-task', '~/cache', str(world.folder / 'text.jsonl')),
    *('--vocabulary', world.vocabulary_path),
  )
  assert 'must be named without ~, but is ' in text
  assert not list(tmp_path.iterdir())


def test_a_trace_can_be_asked_for(monkeypatch):
  monkeypatch.setenv('MOWE_TRACE', '1')
  with pytest.raises(FileNotFoundError):
    _run('ask', '/absent', 'Who?')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('said', 'shown'), [('', 'stopped.'), ('Saved in x.', 'Saved in x.')]
)
def test_a_stopped_verb_says_so(monkeypatch, capsys, said, shown):
  def stop(*arguments, **options):
    raise KeyboardInterrupt(said)

  monkeypatch.setattr(train_vocabulary, 'train_vocabulary', stop)
  assert _run('train-vocabulary', 'a.model', 'a.txt') == 130
  assert capsys.readouterr().err == f'mowe: {shown}\n'


@pytest.mark.slow
def test_train_from_a_gin_file_and_again(world, tmp_path, capsys):
  folder = tmp_path / 'run'
  arguments = _training(world, folder, TRAIN_STEPS=3)
  assert _run(*arguments, '--profile=1') == 0
  shown = capsys.readouterr().out
  assert 'step 3/3' in shown and f'Finished step 3; saved in {folder}' in shown
  assert shown.index('Compiling the step.') < shown.index('step 3/3')
  assert f'Traced steps: 1. The trace is in {folder / "profile"}.' in shown
  files = {path.name for path in folder.iterdir()}
  assert files == {
    'README.md', 'checkpoint_3', 'config.gin', 'eval_metrics.jsonl', 'experts.0.rows',
    'history.jsonl', 'model.json', 'profile', 'routing_vocabulary.npz',
    'speed_metrics.jsonl', 'tensorboard', 'train_metrics.jsonl',
    'vocabulary.model',
  }  # fmt: skip
  # Rates are those of the gin files; speed is in a file of its own.
  (line,) = train_metrics.read_json_lines(folder / 'train_metrics.jsonl')
  assert line['learning_rate'] > 0 and line['row_learning_rate'] > 0
  assert not any(name.startswith('speed/') for name in line)
  (line,) = train_metrics.read_json_lines(folder / 'speed_metrics.jsonl')
  assert line['step'] == 3 and line['speed/tokens_per_second'] > 0
  # A finished run can be started again from its config, and does nothing.
  assert _run('train', f'--gin_file={folder / "config.gin"}') == 0
  assert 'Resumed' in capsys.readouterr().out
  text = _refused(capsys, *_training(world, folder, RANDOM_SEED=7))
  assert 'seed: 0 then, 7 now' in text and 'another folder' in text


# The verbs below read text.


def test_quickstart_gets_what_was_given(monkeypatch):
  calls = []

  signature = inspect.signature(quickstart.quickstart)

  def record(*arguments, **named):
    # An argument that `quickstart` does not take is an error here, too.
    calls.append(signature.bind(*arguments, **named).arguments)

  monkeypatch.setattr(quickstart, 'quickstart', record)
  assert _run('quickstart', '--output', 'out', '--steps', 7) == 0
  (given,) = calls
  assert (given['output'], given['steps'], given['recipe']) == (
    'out',
    7,
    'world',
  )


def _parsers(parser):
  yield parser
  for action in parser._actions:
    if isinstance(action, argparse._SubParsersAction):
      for inner in action.choices.values():
        yield from _parsers(inner)


def test_every_option_is_explained():
  parsers = list(_parsers(main._make_parser()))
  assert len(parsers) > 10
  for parser in parsers:
    for action in parser._actions:
      is_verb = isinstance(action, argparse._SubParsersAction)
      assert action.help or is_verb, (parser.prog, action.dest)


def test_cache_task(world, tmp_path, capsys):
  arguments = (
    'cache-task', tmp_path / 'cache', world.folder / 'questions.jsonl',
    '--vocabulary', world.vocabulary_path, '--kind', 'questions',
    '--num_workers', 1,
  )  # fmt: skip
  assert _run(*arguments) == 0
  assert '21 examples' in capsys.readouterr().out
  # If the cache exists, the same command leaves it as it is.
  before = (tmp_path / 'cache' / 'cache.json').stat().st_mtime_ns
  assert _run(*arguments) == 0
  assert (tmp_path / 'cache' / 'cache.json').stat().st_mtime_ns == before
  text = _refused(capsys, *arguments, '--prompt', 'Q: {question}')
  assert 'overwrite' in text
  assert _run(*arguments, '--prompt', 'Q: {question}', '--overwrite') == 0


@pytest.mark.parametrize(
  ('options', 'part'),
  [
    ([], 'exactly one'),
    (['absent.jsonl'], 'absent.jsonl'),
    (['{file}', '--field', 'body'], 'body'),
    (['{file}', '--kind', 'questions'], 'answers'),
    (['{file}', '--seqio_task', 'x'], 'exactly one'),
    # Options of other sources are not dropped silently.
    (['{file}', '--split', 'test'], "of kind 'text' are .*, but --split was"),
    (['{file}', '--kind', 'claims', '--prompt', 'a'], 'are none, but --prompt'),
    (
      ['{file}', '--kind', 'questions', '--title_field', 'a'],
      'are answers_field, metric, prompt, but --title_field was given. Leave',
    ),
    (['--seqio_task', 'x', '--kind', 'text'], 'of a seqio task .* but --kind'),
  ],
)
def test_cache_task_refuses(world, tmp_path, capsys, options, part):
  file = world.folder / 'text.jsonl'
  options = [option.format(file=file) for option in options]
  text = _refused(
    capsys, 'cache-task', tmp_path / 'c', *options,
    '--vocabulary', world.vocabulary_path,
  )  # fmt: skip
  assert re.search(part, text)


def _build(world, output, *more):
  return [
    'build-routing-vocabulary', output, world.folder / 'text.jsonl',
    '--vocabulary', world.vocabulary_path, '--num_experts', 6,
    '--num_words', 30, '--num_skipped', 1, *more,
  ]  # fmt: skip


def test_build_routing_vocabulary(world, tmp_path, capsys):
  assert _run(*_build(world, tmp_path / 'hashed.npz')) == 0
  shown = capsys.readouterr().out
  assert '6 experts' in shown and 'in 12 texts' in shown
  hashed = routing_vocabulary.load(tmp_path / 'hashed.npz')
  assert hashed.num_experts == 6 and hashed.num_skipped == 1
  hashed.check_subwords(world.vocabulary)
  assert _run(*_build(world, tmp_path / 'balanced.npz', '--balanced')) == 0
  balanced = routing_vocabulary.load(tmp_path / 'balanced.npz')
  np.testing.assert_array_equal(hashed.counts, balanced.counts)
  assert balanced.loads().max_over_mean < hashed.loads().max_over_mean


def test_build_routing_vocabulary_in_blocks(world, tmp_path, capsys):
  assert _run(*_build(world, tmp_path / 'plain.npz')) == 0
  assert 'blocks' not in capsys.readouterr().out
  assert _run(*_build(world, tmp_path / 'placed.npz', '--num_blocks', 3)) == 0
  assert '3 blocks of 2 experts; the busiest has' in capsys.readouterr().out
  plain, placed = (
    placement.balance(
      routing_vocabulary.load(tmp_path / name).loads().shares, 3
    ).max_over_mean
    for name in ('plain.npz', 'placed.npz')
  )
  assert placed < plain
  # The number of blocks is refused before any text is read.
  text = _refused(
    capsys, *_build(world, tmp_path / 'no.npz', '--num_blocks', 4)
  )
  assert 'num_experts = 6, but is 4' in text
  assert not (tmp_path / 'no.npz').exists()


def test_build_routing_vocabulary_of_names(world, tmp_path):
  names = tmp_path / 'names.tsv'
  names.write_text('Zorblat of Delft\t17\nQuimby\t3\nNobody\n')
  output = tmp_path / 'names.npz'
  assert _run(*_build(world, output, '--names', names)) == 0
  built = routing_vocabulary.load(output)
  words = {
    built.word(i) for i in range(built.num_words) if not built.is_piece[i]
  }
  assert {'zorblat', 'delft', 'quimby'} <= words
  assert not words & {'anna', 'karlsburg', 'old', '17'}


def test_explain(world, capsys):
  assert _run(
    'explain', world.routing_path, 'Zorblat met Quimby.',
    '--vocabulary', world.vocabulary_path,
  ) == 0  # fmt: skip
  shown = capsys.readouterr().out
  assert 'zorblat' in shown and 'whole word' in shown and 'punctuation' in shown
  text = _refused(
    capsys, 'explain', world.routing_path, 'x', '--vocabulary', 'bytes'
  )
  assert 'built for' in text


def test_train_vocabulary(world, tmp_path, capsys):
  output = tmp_path / 'own.model'
  file = world.folder / 'text.jsonl'
  assert _run('train-vocabulary', output, file, '--size', 40) == 0
  assert '140 ids with sentinels' in capsys.readouterr().out
  assert (
    subword_vocabularies.load_subwords(output).sha256 == world.vocabulary.sha256
  )
  text = _refused(capsys, 'train-vocabulary', output, file, '--size', 9000)
  assert '9000' in text and 'or less' in text


def test_train_vocabulary_takes_options_of_pieces(world, tmp_path, capsys):
  output = tmp_path / 'own.model'
  arguments = 'train-vocabulary', output, world.folder / 'text.jsonl'
  options = '--model_type', 'bpe', '--byte_fallback', '--size', 300
  assert _run(*arguments, *options) == 0
  own = subword_vocabularies.load_subwords(output)
  # The text has no such letter, which is written as its two bytes.
  assert own.decode(own.encode('\u00f8')) == '\u00f8'
  text = _refused(capsys, *arguments, '--character_coverage', 1.5)
  assert 'from 0.98 to 1' in text and 'but is 1.5' in text
  text = _refused(capsys, *arguments, '--words', '--byte_fallback')
  assert '--byte_fallback must be given for pieces' in text


def test_a_vocabulary_knows_the_characters_of_questions(world, tmp_path):
  output = tmp_path / 'own.model'
  asked = tmp_path / 'questions.jsonl'
  asked.write_text('{"question": "who is it\u00bf\u00bf\u00bf"}\n' * 20)
  arguments = ('train-vocabulary', output, world.folder / 'text.jsonl')
  assert _run(*arguments, '--size', 40) == 0
  unknown = subword_vocabularies.load_subwords(output)
  assert unknown.decode(unknown.encode('it\u00bf')) != 'it\u00bf'
  assert _run(*arguments, '--size', 40, '--questions', asked) == 0
  known = subword_vocabularies.load_subwords(output)
  assert known.decode(known.encode('it\u00bf')) == 'it\u00bf'


# The verbs below read a trained model.


def _asking(world, verb, trained, output, **macros):
  name = {'evaluate': 'EVAL_OUTPUT_DIR', 'infer': 'INFER_OUTPUT_DIR'}[verb]
  macros = {
    'CHECKPOINT_PATH': trained,
    name: str(output),
    'CACHE_DIR': world.cache_dir,
    'MIXTURE_OR_TASK_NAME': 'questions',
    'BATCH_SIZE': 2,
  } | macros
  return [verb, f'--gin_file=gin_configs/runs/{verb}.gin', *_gin(**macros)]


@pytest.mark.slow
def test_evaluate(world, trained, tmp_path, capsys):
  assert _run(*_asking(world, 'evaluate', trained, tmp_path / 'out')) == 0
  shown = capsys.readouterr().out
  assert 'EM ' in shown and '(21 questions, step 1)' in shown
  assert 'met ' in shown, 'the relation has a line of its own'
  results = json.loads((tmp_path / 'out' / 'results.json').read_text())
  assert results['num_questions'] == 21
  lines = (tmp_path / 'out' / 'predictions.jsonl').read_text().splitlines()
  assert len(lines) == 21
  assert json.loads(lines[0])['question'] == 'Who met Quimby?'


def test_infer_goes_on_behind_a_half_written_line(
  world, trained, tmp_path, capsys
):
  arguments = _asking(world, 'infer', trained, tmp_path)
  assert _run(*arguments) == 0
  path = tmp_path / 'questions-predictions.jsonl'
  whole = path.read_bytes()
  lines = whole.split(b'\n')[:-1]
  assert [json.loads(line)['index'] for line in lines] == list(range(21))
  assert 'met Quimby' in json.loads(lines[0])['inputs']
  # A run that was killed has left five lines and a half.
  end = len(b'\n'.join(lines[:5])) + 1
  path.write_bytes(whole[: end + 9])
  capsys.readouterr()
  assert _run(*arguments) == 0
  assert 'has 5 predictions; continuing' in capsys.readouterr().out
  again = path.read_bytes().split(b'\n')[:-1]
  assert len(again) == 21
  for one, other in zip(lines, again, strict=True):
    one, other = json.loads(one), json.loads(other)
    assert other.pop('score') == pytest.approx(one.pop('score'), abs=1e-4)
    assert one == other
  # All predictions are there, so nothing is added.
  before = path.read_bytes()
  assert _run(*arguments) == 0 and path.read_bytes() == before
  # Predictions of another run are not continued, and stay as they are.
  lengths = {'inputs': 26, 'targets': 2}
  text = _refused(
    capsys,
    *_asking(world, 'infer', trained, tmp_path, TASK_FEATURE_LENGTHS=lengths),
  )
  assert 'differs in lengths' in text and 'Give another INFER_OUT' in text
  assert path.read_bytes() == before


@pytest.mark.slow
def test_ask(trained, capsys):
  assert _run('ask', trained, 'Who met Zorblat?', '--max_length', 3) == 0
  shown = capsys.readouterr().out.splitlines()
  assert shown[0] == 'Who met Zorblat?' and shown[1].startswith('  ')
  assert _run(
    'ask', f'{trained}/checkpoint_1', 'Who met Zorblat?', '--max_length', 3,
    '--num_beams', 2, '--explain',
  ) == 0  # fmt: skip
  shown = capsys.readouterr().out
  assert 'expert' in shown and 'zorblat' in shown


def test_ask_reads_the_prompt(trained, capsys, monkeypatch):
  lines = iter(['', 'Who?'])

  def typed(prompt):
    try:
      return next(lines)
    except StopIteration:
      raise EOFError from None

  monkeypatch.setattr('builtins.input', typed)
  ask.converse(ask.Answerer(trained, max_length=3))
  (answer, end) = capsys.readouterr().out.splitlines()
  assert answer.startswith('  ') and not end


@pytest.mark.parametrize(
  ('arguments', 'part'),
  [
    (['/absent', 'Who?'], 'model.json'),
    (['{model}/checkpoint_9', 'Who?'], 'step 9'),
    (['{model}', 'Who?', '--num_beams', '0'], 'num_beams'),
    (['{model}', 'Who?', '--max_length', '0'], 'max_target_length'),
    (['{model}', 'Who?', '--prompt', '{{wrong}}'], '{{question}}'),
    (['{model}', 'Who?', '--prompt', 'question:'], '{{question}}'),
  ],
)
def test_ask_refuses(trained, capsys, arguments, part):
  arguments = [argument.format(model=trained) for argument in arguments]
  assert part.format() in _refused(capsys, 'ask', *arguments)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused(world, tmp_path, capsys):
  folder = tmp_path / 'run'
  world.train(folder, 1, model=world.config(sparse=False))
  largest = max(
    (p for p in (folder / 'checkpoint_1').rglob('*') if p.is_file()),
    key=os.path.getsize,
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  text = _refused(capsys, 'ask', folder, 'Who?')
  assert 'other contents' in text


def test_a_resume_of_a_damaged_step_names_the_command(monkeypatch, capsys):
  def damaged(*unused, **also_unused):
    raise train.CannotResumeError('checkpoint_7 has other contents.')

  monkeypatch.setattr(train, 'train', damaged)
  monkeypatch.setattr(train, 'Training', object)
  monkeypatch.setattr(gin_config, 'parse', lambda *unused: None)
  monkeypatch.setattr(gin_config, 'call', lambda *unused: None)
  file = '--gin_file=gin_configs/models/t5_tiny.gin'
  text = _refused(capsys, 'train', file, "--gin.MODEL_DIR='x y'")
  command = f"""mowe train {file} '--gin.MODEL_DIR='"'"'x y'"'"''"""
  assert f'that is whole: {command} --from_step last_good' in text


def test_bindings_of_a_verb_without_gin_are_refused(trained, capsys):
  with pytest.raises(SystemExit):
    _run('ask', trained, 'Who?', '--gin.BATCH_SIZE=3')
  assert 'reads no gin' in capsys.readouterr().err
