"""Verbs that make or read models: their options, and what they call."""

import os
import sys

from mowe.cli import gin_arguments

# Everything else is imported by the verb that needs it: `mowe --help` is fast.


def add_to(verbs) -> None:
  """Adds the verbs to the subparsers of `mowe`."""
  _add_train(verbs)
  _add_evaluate(verbs)
  _add_infer(verbs)
  _add_ask(verbs)
  _add_convert(verbs)


def _add_train(verbs):
  parser = verbs.add_parser(
    'train', help='pretrain or finetune, from gin files'
  )
  gin_arguments.add_to(parser)
  parser.add_argument(
    '--dry_run', action='store_true', help='print what would be done'
  )
  parser.add_argument('--tfds_data_dir', help='where TFDS keeps its data sets')
  _add_distributed(parser)
  parser.set_defaults(run=_train)


def _train(options, bindings):
  _join_processes(options)
  gin_config = gin_arguments.parse(options, bindings)
  from mowe.commands import train

  if options.tfds_data_dir:
    from mowe.data import seqio_stream

    _, seqio = seqio_stream.import_seqio()
    seqio.set_tfds_data_dir_override(options.tfds_data_dir)
  arguments = {'dry_run': True} if options.dry_run else {}
  gin_config.call(
    train.train, config_text=gin_config.operative_config, **arguments
  )


def _add_distributed(parser):
  parser.add_argument('--coordinator_address', help='host:port, if several')
  parser.add_argument('--process_count', type=int)
  parser.add_argument('--process_index', type=int)


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


def _add_evaluate(verbs):
  parser = verbs.add_parser(
    'evaluate', help='answer questions, or predict a text'
  )
  gin_arguments.add_to(parser)
  parser.set_defaults(run=_evaluate)


def _evaluate(options, bindings):
  gin_config = gin_arguments.parse(options, bindings)
  from mowe.commands import evaluate

  gin_config.call(evaluate.evaluate)


def _add_infer(verbs):
  parser = verbs.add_parser('infer', help='write predictions for a task')
  gin_arguments.add_to(parser)
  parser.set_defaults(run=_infer)


def _infer(options, bindings):
  gin_config = gin_arguments.parse(options, bindings)
  from mowe.commands import infer

  gin_config.call(infer.infer)


def _add_ask(verbs):
  parser = verbs.add_parser('ask', help='ask a model questions')
  parser.add_argument('model', help='a model folder, or a checkpoint in it')
  parser.add_argument(
    'questions', nargs='*', help='asked at a prompt if none is given'
  )
  parser.add_argument(
    '--prompt', default='question: {question}', help='as in finetuning'
  )
  parser.add_argument('--num_beams', type=int, default=1)
  parser.add_argument('--max_length', type=int, default=32)
  parser.add_argument(
    '--explain', action='store_true', help="show the words' experts"
  )
  parser.add_argument(
    '--experts_on',
    choices=('device', 'host', 'disk'),
    help='where experts are read from; default: disk if they exceed 4 GiB',
  )
  parser.set_defaults(run=_ask)


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


def _add_convert(verbs):
  parser = verbs.add_parser(
    'convert', help='weights of T5X and Hugging Face in and out'
  )
  parser.add_argument(
    'source', help='a model folder, safetensors, or a checkpoint of T5X'
  )
  parser.add_argument('target', help='the folder to write')
  parser.add_argument(
    '--to',
    required=True,
    choices=('mowe', 'safetensors', 'huggingface', 't5x', 't5x-orbax'),
    help='a model folder, our safetensors, those of transformers, T5X',
  )
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  parser.add_argument(
    '--vocabulary',
    help="SentencePiece model or 'bytes', if the source has none",
  )
  parser.add_argument(
    '--extra_ids', type=int, help='sentinels of that vocabulary; 100'
  )
  parser.add_argument(
    '--like', help='a model that says what a checkpoint of T5X is'
  )
  parser.set_defaults(run=_convert)


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
