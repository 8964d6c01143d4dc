"""The `mowe` command: one function for each verb; see README.md."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence

# Everything else is imported by the verb that needs it: `mowe --help` is fast.


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a verb; returns the exit status.

  Errors of input are shown as one paragraph, without a trace: they say what
  must hold, what was found and what to do. MOWE_TRACE=1 shows the trace.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  parser = _make_parser()
  options, rest = parser.parse_known_args(arguments)
  bindings = _take_bindings(rest)
  if rest:
    parser.error(
      f'unknown arguments {rest}. Options of gin are --gin.NAME=VALUE.'
    )
  if bindings and not hasattr(options, 'gin_file'):
    parser.error(f'{options.verb} reads no gin, but has {bindings}.')
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  try:
    options.run(options, bindings)
  except (ValueError, OSError, FloatingPointError) as error:
    if os.environ.get('MOWE_TRACE'):
      raise
    # Gin adds to every error through which of its calls it came.
    text = re.sub(r'\n\s*In call to configurable .*', '', str(error))
    print(f'mowe: {text}', file=sys.stderr)
    return 1
  except RuntimeError as error:
    # Of a callback, when a compiled program reads experts from the host: jax
    # keeps only the text.
    damaged = re.search(r'DamagedCheckpointError: (.*)', str(error))
    if not damaged or os.environ.get('MOWE_TRACE'):
      raise
    print(f'mowe: {damaged[1]}', file=sys.stderr)
    return 1
  except KeyboardInterrupt as error:
    print(f'mowe: {error or "stopped."}', file=sys.stderr)
    return 130
  return 0


def _make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='mowe', description='Sparse T5-style language models in JAX.'
  )
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

  train = verbs.add_parser('train', help='pretrain or finetune, from gin files')
  _add_gin(train)
  train.add_argument(
    '--dry_run', action='store_true', help='print what would be done'
  )
  train.add_argument('--tfds_data_dir', help='where TFDS keeps its data sets')
  _add_distributed(train)
  train.set_defaults(run=_train)

  evaluate = verbs.add_parser(
    'evaluate', help='answer questions, or predict a text'
  )
  _add_gin(evaluate)
  evaluate.set_defaults(run=_evaluate)

  infer = verbs.add_parser('infer', help='write predictions for a task')
  _add_gin(infer)
  infer.set_defaults(run=_infer)

  ask = verbs.add_parser('ask', help='ask a model questions')
  ask.add_argument('model', help='a model folder, or a checkpoint in it')
  ask.add_argument(
    'questions', nargs='*', help='asked at a prompt if none is given'
  )
  ask.add_argument(
    '--prompt', default='question: {question}', help='as in finetuning'
  )
  ask.add_argument('--num_beams', type=int, default=1)
  ask.add_argument('--max_length', type=int, default=32)
  ask.add_argument(
    '--explain', action='store_true', help="show the words' experts"
  )
  ask.add_argument(
    '--experts_on',
    choices=('device', 'host', 'disk'),
    help='where experts are read from; default: disk if they exceed 4 GiB',
  )
  ask.set_defaults(run=_ask)

  convert = verbs.add_parser(
    'convert', help='weights of T5X and Hugging Face in and out'
  )
  convert.add_argument(
    'source', help='a model folder, safetensors, or a checkpoint of T5X'
  )
  convert.add_argument('target', help='the folder to write')
  convert.add_argument(
    '--to',
    required=True,
    choices=('mowe', 'safetensors', 'huggingface', 't5x', 't5x-orbax'),
    help='a model folder, our safetensors, those of transformers, T5X',
  )
  convert.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  convert.add_argument(
    '--vocabulary',
    help="SentencePiece model or 'bytes', if the source has none",
  )
  convert.add_argument(
    '--extra_ids', type=int, help='sentinels of that vocabulary; 100'
  )
  convert.add_argument(
    '--like', help='a model that says what a checkpoint of T5X is'
  )
  convert.set_defaults(run=_convert)

  _add_modules(
    verbs.add_parser('modules', help='add, prune or measure modules')
  )

  words = verbs.add_parser(
    'build-routing-vocabulary', help='count words and give them experts'
  )
  words.add_argument('output', help='the file to write (.npz)')
  words.add_argument('files', nargs='+', help='.txt or .jsonl, also .gz; globs')
  words.add_argument(
    '--vocabulary', required=True, help="SentencePiece model, or 'bytes'"
  )
  words.add_argument('--num_experts', type=int, required=True)
  words.add_argument('--num_words', type=int, default=1_000_000)
  words.add_argument('--num_skipped', type=int, default=16)
  words.add_argument(
    '--names', nargs='*', default=(), help='files of names: only their words'
  )
  words.add_argument('--balanced', action='store_true', help='not id modulo')
  words.add_argument(
    '--num_blocks',
    type=int,
    default=1,
    help='evenly loaded parts for devices that share the experts, such as 128',
  )
  words.add_argument('--field', default='text', help='of .jsonl records')
  words.add_argument('--num_workers', type=int)
  words.add_argument('--extra_ids', type=int, default=100)
  words.set_defaults(run=_build_routing_vocabulary)

  explain = verbs.add_parser(
    'explain', help='show which expert each word of a text has'
  )
  explain.add_argument('routing_vocabulary', help='.npz')
  explain.add_argument('text')
  explain.add_argument('--vocabulary', required=True)
  explain.add_argument('--extra_ids', type=int, default=100)
  explain.set_defaults(run=_explain)

  cache = verbs.add_parser('cache-task', help='tokenise a task once')
  cache.add_argument('output', help='the folder to write')
  cache.add_argument('files', nargs='*', help='.txt or .jsonl, also .gz; globs')
  cache.add_argument('--vocabulary', required=True)
  cache.add_argument(
    '--kind',
    choices=('text', 'questions', 'language_model'),
    default='text',
  )
  cache.add_argument('--seqio_task', default='', help='instead of files')
  cache.add_argument(
    '--task_modules', nargs='*', default=(), help="default: mowe's own tasks"
  )
  cache.add_argument('--tfds_data_dir', help='where TFDS keeps its data sets')
  cache.add_argument('--split', default='train', help='of the seqio task')
  cache.add_argument('--field', default='text')
  cache.add_argument(
    '--unit', choices=('line', 'paragraph', 'file'), default='line'
  )
  cache.add_argument('--prompt', default='question: {question}')
  cache.add_argument('--answers_field', default='answers')
  cache.add_argument('--overwrite', action='store_true')
  cache.add_argument('--num_workers', type=int)
  cache.add_argument('--extra_ids', type=int, default=100)
  cache.set_defaults(run=_cache_task)

  vocabulary = verbs.add_parser(
    'train-vocabulary', help='make a vocabulary of pieces or words of text'
  )
  vocabulary.add_argument('output', help='the file to write')
  vocabulary.add_argument('files', nargs='+')
  vocabulary.add_argument(
    '--size', type=int, help='default: 32,000 pieces, or all words'
  )
  vocabulary.add_argument(
    '--words', action='store_true', help='whole words between white space'
  )
  vocabulary.add_argument('--field', default='text')
  vocabulary.add_argument(
    '--questions', nargs='+', default=(), help='.jsonl files with questions'
  )
  vocabulary.set_defaults(run=_train_vocabulary)

  compare = verbs.add_parser(
    'compare', help='train and compare the models of an experiment'
  )
  compare.add_argument('experiment', help='gin_configs/experiments/*.gin')
  _add_gin(compare)
  compare.add_argument(
    '--dry_run', action='store_true', help='size the models, and stop'
  )
  compare.add_argument(
    '--add',
    action='append',
    default=[],
    metavar='NAME=FOLDER',
    help='a finetuned model from elsewhere',
  )
  compare.set_defaults(run=_compare)

  quickstart = verbs.add_parser(
    'quickstart', help='T5 and MoWE of equal FLOPs, from text to answers'
  )
  quickstart.add_argument('--output', default='quickstart_output')
  quickstart.add_argument(
    '--data_dir', help='documents, qa_train, qa_validation .jsonl of your own'
  )
  quickstart.add_argument(
    '--recipe', default='world', help='gin_configs/examples/<recipe>_*.gin'
  )
  quickstart.add_argument('--vocabulary', help='default: trained on the text')
  quickstart.add_argument('--vocabulary_size', type=int, default=1000)
  quickstart.add_argument('--num_experts', type=int, default=2048)
  quickstart.add_argument('--names_files', nargs='*', default=())
  quickstart.add_argument('--num_seeds', type=int, default=1)
  quickstart.add_argument(
    '--with_longer_t5', action='store_true', help='a T5 trained 3x as long'
  )
  quickstart.add_argument(
    '--with_larger_t5',
    action='store_true',
    help='a T5 with as many parameters in all (hours on a CPU)',
  )
  quickstart.add_argument(
    '--with_moe',
    nargs='+',
    default=(),
    choices=('switch', 'top2', 'expert_choice', 'hash'),
    help='also mixtures of experts',
  )
  quickstart.add_argument('--steps', type=int, help='of pretraining')
  quickstart.add_argument('--finetune_steps', type=int)
  quickstart.set_defaults(run=_quickstart)
  return parser


def _add_modules(parser):
  actions = parser.add_subparsers(dest='action', required=True)
  add = actions.add_parser('add', help='a model with more modules')
  prune = actions.add_parser('prune', help='a model without the least used')
  for action in (add, prune):
    action.add_argument('source', help='a model folder, or a checkpoint in it')
    action.add_argument('target', help='the model folder to write')
    action.add_argument(
      '--expert_parts',
      type=int,
      default=1,
      help='parts of the mesh axis expert that modules will lie on',
    )
  add.add_argument('--mlp', type=int, default=0, help='new ones in each layer')
  add.add_argument('--attention', type=int, default=0, help='likewise')
  add.add_argument('--k', type=int, default=1, help='new ones of a token')
  add.add_argument('--seed', type=int, default=0)
  add.set_defaults(run=_modules_add)
  prune.add_argument(
    '--usage', required=True, help='usage.json of `mowe modules usage`'
  )
  prune.add_argument('--fraction', type=float, help='of modules that are left')
  prune.add_argument(
    '--threshold', type=float, help='least use, relative to the mean'
  )
  prune.add_argument(
    '--gates',
    choices=('keep', 'renormalise'),
    default='keep',
    help='whether gates stay, or grow by what removed modules had',
  )
  prune.set_defaults(run=_modules_prune)
  usage = actions.add_parser('usage', help='which modules a task uses')
  _add_gin(usage)
  usage.set_defaults(run=_modules_usage)


def _add_gin(parser):
  parser.add_argument(
    '--gin_file', action='append', default=[], help='read in order'
  )
  parser.add_argument(
    '--gin_search_paths', default='', help='folders, joined by commas'
  )
  parser.add_argument(
    '--gin_bindings', action='append', default=[], help='"NAME = VALUE"'
  )


def _add_distributed(parser):
  parser.add_argument('--coordinator_address', help='host:port, if several')
  parser.add_argument('--process_count', type=int)
  parser.add_argument('--process_index', type=int)


def _take_bindings(rest: list[str]) -> list[str]:
  """Removes `--gin.NAME=VALUE` from `rest`; returns them as bindings."""
  bindings = []
  for argument in [a for a in rest if a.startswith('--gin.')]:
    name, equals, value = argument.removeprefix('--gin.').partition('=')
    if not equals:
      raise SystemExit(
        f'mowe: {argument} must be --gin.NAME=VALUE. Put no blank around =.'
      )
    bindings.append(f'{name} = {value}')
    rest.remove(argument)
  return bindings


def _parse_gin(options, bindings):
  from mowe.commands import gin_config

  paths = [path for path in options.gin_search_paths.split(',') if path]
  gin_config.parse(options.gin_file, [*options.gin_bindings, *bindings], paths)
  return gin_config


def _train(options, bindings):
  _join_processes(options)
  gin_config = _parse_gin(options, bindings)
  from mowe.commands import train

  if options.tfds_data_dir:
    from mowe.data import seqio_stream

    _, seqio = seqio_stream.import_seqio()
    seqio.set_tfds_data_dir_override(options.tfds_data_dir)
  arguments = {'dry_run': True} if options.dry_run else {}
  gin_config.call(
    train.train, config_text=gin_config.operative_config, **arguments
  )


def _join_processes(options):
  """Connects the processes of a multi-host run; the first one speaks."""
  if options.coordinator_address is None:
    return
  import jax

  jax.distributed.initialize(
    options.coordinator_address, options.process_count, options.process_index
  )
  if jax.process_index() != 0:
    sys.stdout = open(os.devnull, 'w')


def _evaluate(options, bindings):
  gin_config = _parse_gin(options, bindings)
  from mowe.commands import evaluate

  gin_config.call(evaluate.evaluate)


def _infer(options, bindings):
  gin_config = _parse_gin(options, bindings)
  from mowe.commands import infer

  gin_config.call(infer.infer)


def _ask(options, bindings):
  del bindings
  from mowe.commands import ask
  from mowe.stores import expert_stores

  stores = {
    'device': expert_stores.DeviceStore(),
    'host': expert_stores.HostStore(),
    'disk': expert_stores.DiskStore(),
    None: None,
  }
  ask.ask(
    options.model,
    options.questions,
    prompt=options.prompt,
    num_beams=options.num_beams,
    max_length=options.max_length,
    explain=options.explain,
    store=stores[options.experts_on],
  )


def _convert(options, bindings):
  del bindings
  from mowe.commands import convert

  convert.convert(
    options.source,
    options.target,
    options.to,
    dtype=options.dtype,
    vocabulary=options.vocabulary,
    extra_ids=options.extra_ids,
    like=options.like,
  )


def _modules_add(options, bindings):
  del bindings
  from mowe.commands import modules

  modules.add(
    options.source,
    options.target,
    mlp=options.mlp,
    attention=options.attention,
    k=options.k,
    seed=options.seed,
    expert_parts=options.expert_parts,
  )


def _modules_prune(options, bindings):
  del bindings
  from mowe.commands import modules

  modules.prune(
    options.source,
    options.target,
    usage=options.usage,
    fraction=options.fraction,
    threshold=options.threshold,
    gates=options.gates,
    expert_parts=options.expert_parts,
  )


def _modules_usage(options, bindings):
  gin_config = _parse_gin(options, bindings)
  from mowe.commands import modules

  gin_config.call(modules.usage)


def _build_routing_vocabulary(options, bindings):
  del bindings
  from mowe.commands import build_routing_vocabulary as command

  command.build_routing_vocabulary(
    options.output,
    options.files,
    options.vocabulary,
    num_experts=options.num_experts,
    num_words=options.num_words,
    num_skipped=options.num_skipped,
    names_files=options.names,
    balanced=options.balanced,
    num_blocks=options.num_blocks,
    field=options.field,
    num_workers=options.num_workers,
    extra_ids=options.extra_ids,
  )


def _explain(options, bindings):
  del bindings
  from mowe.words import routing_vocabulary, subwords

  routing = routing_vocabulary.load(options.routing_vocabulary)
  vocabulary = subwords.load_subwords(options.vocabulary, options.extra_ids)
  rows = routing.explain(options.text, vocabulary)
  print(routing_vocabulary.format_explanation(rows))


def _cache_task(options, bindings):
  del bindings
  from mowe.commands import cache_task, show_progress

  with show_progress.counting('records') as progress:
    cache = cache_task.cache_task(
      options.output,
      options.vocabulary,
      files=options.files,
      kind=options.kind,
      seqio_task=options.seqio_task,
      split=options.split,
      task_modules=options.task_modules,
      tfds_data_dir=options.tfds_data_dir,
      extra_ids=options.extra_ids,
      field=options.field,
      unit=options.unit,
      prompt=options.prompt,
      answers_field=options.answers_field,
      overwrite=options.overwrite,
      num_workers=options.num_workers,
      progress=progress,
    )
  tokens = ', '.join(
    f'{int(cache.lengths(name).sum()):,} tokens of {name}'
    for name in cache.features
    if name != 'spans'
  )
  print(f'{cache.path}: {cache.num_examples:,} examples, {tokens}.')


def _train_vocabulary(options, bindings):
  del bindings
  from mowe.commands import train_vocabulary

  vocabulary = train_vocabulary.train_vocabulary(
    options.output,
    options.files,
    size=options.size,
    field=options.field,
    questions=options.questions,
    words=options.words,
  )
  print(f'{options.output}: {vocabulary.size:,} ids with sentinels.')


def _compare(options, bindings):
  _leave_devices_to_runs()
  from mowe.commands import compare, compare_experiment

  experiment = compare_experiment.load(
    [options.experiment, *options.gin_file],
    [*options.gin_bindings, *bindings],
    [path for path in options.gin_search_paths.split(',') if path],
  )
  for added in options.add:
    experiment = compare_experiment.with_folder(experiment, added)
  compared = compare.compare(experiment, dry_run=options.dry_run)
  if compared is not None:
    compare.show(compared)


def _leave_devices_to_runs():
  """Runs are processes of their own; this one only looks at shapes."""
  import jax

  jax.config.update('jax_platforms', 'cpu')


def _quickstart(options, bindings):
  del bindings
  _leave_devices_to_runs()
  from mowe.commands import quickstart

  settings = vars(options)
  for name in ('verb', 'run'):
    del settings[name]
  quickstart.quickstart(settings.pop('output'), **settings)


if __name__ == '__main__':
  sys.exit(main())
