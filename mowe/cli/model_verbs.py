"""Verbs that make or read models: their options, and what they call."""

import argparse
import contextlib
import os
import sys

from mowe.cli import gin_arguments, verb_parsers

# Each verb imports what it needs only when it runs, so that `mowe --help` is
# fast.

_LAST_GOOD = 'last_good'


def add_to(verbs) -> None:
  """Adds the verbs to the subparsers of `mowe`."""
  _add_train(verbs)
  _add_evaluate(verbs)
  _add_infer(verbs)
  _add_ask(verbs)
  _add_serve(verbs)
  _add_convert(verbs)
  _add_inspect(verbs)


def _add_train(verbs):
  parser = verb_parsers.add(
    verbs,
    'train',
    does='pretrain or finetune a model, as gin files say',
    description='Trains a model in MODEL_DIR, or goes on with what is there. '
    + verb_parsers.MACROS,
    example='mowe train --gin_file=gin_configs/examples/text_pretrain_mowe.gin '
    '\\\n  --gin.VOCABULARY_PATH=vocabulary.model '
    '--gin.ROUTING_VOCABULARY=words.npz \\\n  --gin.CACHE_DIR=cache '
    '--gin.MIXTURE_OR_TASK_NAME=corpus --gin.MODEL_DIR=runs/mowe --dry_run',
  )
  gin_arguments.add_to(parser)
  parser.add_argument(
    '--dry_run',
    nargs='?',
    const='compile',
    choices=('compile', 'measure'),
    help='print what would be done and what memory a step needs, and stop; '
    '--dry_run=measure also makes a few steps and says how long the run takes',
  )
  parser.add_argument(
    '--topology',
    metavar='CHIP:SHAPE',
    help='with --dry_run: devices that need not be there, such as v5e:2x4, '
    'v5p:2x2x2 or h100:1x1x8; also prints a roofline',
  )
  parser.add_argument(
    '--from_step',
    type=_step,
    metavar='N|last_good',
    help='go on from this step, or from the newest whose files are whole; later '
    'checkpoints are renamed',
  )
  parser.add_argument(
    '--on_spike',
    choices=('stop', 'skip', 'continue'),
    help='what is done if the loss of a batch rises suddenly: the run ends '
    'without saving, or leaves the update of the batch out, or only says so '
    '(default: ON_SPIKE of the gin files)',
  )
  parser.add_argument(
    '--profile',
    type=_number_of_steps,
    default=0,
    metavar='STEPS',
    help="trace so many steps with JAX's profiler, from the third on, for "
    'xprof or Perfetto, in the folder profile of MODEL_DIR',
  )
  parser.add_argument('--tfds_data_dir', help='folder of the TFDS data sets')
  _add_distributed(parser)
  parser.set_defaults(run=_train)


def _step(text: str) -> int | str:
  """Reads a step, or 'last_good'."""
  if text == _LAST_GOOD:
    return text
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(
      f'a step must be a number or {_LAST_GOOD!r}, but is {text!r}. Take one of '
      'those that `mowe inspect` shows.'
    )
  return int(text)


def _number_of_steps(text: str) -> int:
  """Reads a number of steps, at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(
      f'the number of steps must be at least 1, but is {text!r}. A few are '
      'enough, such as 3.'
    )
  return int(text)


def _train(options, bindings):
  if options.topology is None:
    _join_processes(options)
  if options.on_spike is not None:
    bindings = [*bindings, f'ON_SPIKE = {options.on_spike!r}']
  if options.dry_run:
    _dry_run(options, bindings)
    return
  if options.topology is not None:
    raise SystemExit(
      'mowe: --topology only says for which devices --dry_run compiles, but '
      '--dry_run is missing. Add it; a run takes the devices that are there.'
    )
  gin_config = gin_arguments.parse(options, bindings)
  from mowe.commands import train
  from mowe.training.processes import lost_processes

  _use_tfds_folder(options)
  back_to = None
  if options.from_step is not None:
    is_last_good = options.from_step == _LAST_GOOD
    back_to = train.BackTo(None if is_last_good else options.from_step)
  training = gin_config.call(train.Training)
  try:
    with lost_processes.named():
      train.train(
        training,
        back_to=back_to,
        config_text=gin_config.operative_config,
        num_profiled=options.profile,
      )
  except train.CannotResumeError as error:
    raise ValueError(
      f'{error} To go on from the newest step that is whole: {options.command} '
      f'--from_step {_LAST_GOOD}'
    ) from error
  except lost_processes.ProcessLostError as error:
    print(f'mowe: {error}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # At an ordinary end JAX would wait for the lost process, and then abort.
    os._exit(1)


def _dry_run(options, bindings):
  topology = None
  tracing = contextlib.nullcontext()
  is_measured = options.dry_run == 'measure'
  if is_measured and options.topology is not None:
    raise SystemExit(
      'mowe: --dry_run=measure makes steps on the devices of this machine, but '
      f'--topology {options.topology} asks for others. Leave one of them out.'
    )
  if options.topology is not None:
    # Nothing runs, and JAX must not look for devices of other platforms.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    # JAX cannot read programs for devices that are not there from its cache.
    os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
    from mowe.layers import platforms
    from mowe.training.compiling import compile_ahead

    topology = compile_ahead.Topology.parse(options.topology)
    tracing = platforms.compiling_for(topology.chip.platform)
  # Gin makes dtypes that depend on the platform.
  with tracing:
    gin_config = gin_arguments.parse(options, bindings)
    from mowe.commands import train
    from mowe.commands.ahead import dry_run

    _use_tfds_folder(options)
    dry_run.dry_run(
      gin_config.call(train.Training), topology, is_measured=is_measured
    )


def _use_tfds_folder(options):
  if options.tfds_data_dir:
    from mowe.data import seqio_stream

    _, seqio = seqio_stream.import_seqio()
    seqio.set_tfds_data_dir_override(options.tfds_data_dir)


def _add_distributed(parser):
  parser.add_argument(
    '--coordinator_address',
    metavar='HOST:PORT',
    help='where process 0 is, if several processes train and no launcher tells '
    'them; TPU slices, SLURM and Open MPI do',
  )
  parser.add_argument(
    '--process_count',
    type=int,
    help='number of processes of the run; 1 does not look for others',
  )
  parser.add_argument(
    '--process_index', type=int, help='number of this process, from 0'
  )


def _join_processes(options):
  """Connects the processes of a run; only the first one prints."""
  from mowe.training.processes import joining

  is_joined = joining.join(
    options.coordinator_address, options.process_count, options.process_index
  )
  if is_joined:
    import jax

    if jax.process_index() != 0:
      sys.stdout = open(os.devnull, 'w')


def _add_evaluate(verbs):
  parser = verb_parsers.add(
    verbs,
    'evaluate',
    does="score a model's answers, or its prediction of a text",
    description='Answers every question of a token cache and scores the '
    'answers, or scores how well a language model predicts a text. '
    + verb_parsers.MACROS,
    example='mowe evaluate --gin_file=gin_configs/runs/evaluate.gin '
    '--gin.CHECKPOINT_PATH=runs/mowe \\\n  --gin.CACHE_DIR=cache '
    '--gin.MIXTURE_OR_TASK_NAME=questions --gin.EVAL_OUTPUT_DIR=runs/scores',
  )
  gin_arguments.add_to(parser)
  parser.set_defaults(run=_evaluate)


def _evaluate(options, bindings):
  gin_config = gin_arguments.parse(options, bindings)
  from mowe.commands import evaluate

  gin_config.call(evaluate.evaluate)


def _add_infer(verbs):
  parser = verb_parsers.add(
    verbs,
    'infer',
    does='write the predictions for a task',
    description='Writes a prediction for each example of a token cache, one a '
    'line. A command that was stopped goes on. ' + verb_parsers.MACROS,
    example='mowe infer --gin_file=gin_configs/runs/infer.gin '
    '--gin.CHECKPOINT_PATH=runs/mowe \\\n  --gin.CACHE_DIR=cache '
    '--gin.MIXTURE_OR_TASK_NAME=questions --gin.INFER_OUTPUT_DIR=runs/answers',
  )
  gin_arguments.add_to(parser)
  parser.set_defaults(run=_infer)


def _infer(options, bindings):
  gin_config = gin_arguments.parse(options, bindings)
  from mowe.commands import infer

  gin_config.call(infer.infer)


def _add_ask(verbs):
  parser = verb_parsers.add(
    verbs,
    'ask',
    does='ask a model questions',
    description='Answers questions of the command line, or those that are typed '
    'at a prompt.',
    example="mowe ask runs/mowe_finetuned 'Where was Marie Curie born?' "
    '--explain',
  )
  parser.add_argument('model', help='a model folder, or a checkpoint in it')
  parser.add_argument(
    'questions', nargs='*', help='if there are none, they are read at a prompt'
  )
  _add_answering(parser)
  parser.add_argument(
    '--explain', action='store_true', help='show the expert of each word'
  )
  parser.set_defaults(run=_ask)


def _ask(options, bindings):
  del bindings
  from mowe.commands import ask

  ask.converse(_answerer(options), options.questions, options.explain)


def _add_serve(verbs):
  parser = verb_parsers.add(
    verbs,
    'serve',
    does='answer questions at a page of this machine, and as JSON',
    description='Opens a page on this machine where a model is asked questions '
    'and shows the experts of their words. Programs POST {"questions": [...]} '
    'to /ask. Nobody else can reach it.',
    example='mowe serve runs/mowe_finetuned --port 8000',
  )
  parser.add_argument('model', help='a model folder, or a checkpoint in it')
  parser.add_argument(
    '--port',
    type=int,
    default=8000,
    help='where to listen on 127.0.0.1; 0 takes a free one (default: 8000)',
  )
  _add_answering(parser)
  parser.set_defaults(run=_serve)


def _serve(options, bindings):
  del bindings
  from mowe.commands.serving import server
  from mowe.words import terminations

  with terminations.cleaning_up():
    server.serve(lambda: _answerer(options), options.model, options.port)


def _add_answering(parser):
  """Adds the options that say how questions are answered."""
  parser.add_argument(
    '--prompt',
    default='question: {question}',
    help='the text that finetuning put around a question; default: '
    '"question: {question}"',
  )
  parser.add_argument(
    '--num_beams',
    type=int,
    default=1,
    help='beams of the search; 1 decodes greedily (default)',
  )
  parser.add_argument(
    '--max_length',
    type=int,
    default=32,
    help='most tokens of an answer (default: 32)',
  )
  parser.add_argument(
    '--experts_on',
    choices=('device', 'host', 'disk'),
    help='where word experts are kept; default: device, or disk if they exceed '
    '4 GiB',
  )


def _answerer(options):
  from mowe.commands import ask
  from mowe.stores import expert_stores

  stores = {
    'device': expert_stores.DeviceStore(),
    'host': expert_stores.HostStore(),
    'disk': expert_stores.DiskStore(),
    None: None,
  }
  return ask.Answerer(
    options.model,
    prompt=options.prompt,
    num_beams=options.num_beams,
    max_length=options.max_length,
    store=stores[options.experts_on],
  )


def _add_convert(verbs):
  parser = verb_parsers.add(
    verbs,
    'convert',
    does='convert weights from and to T5X and Hugging Face',
    description='Reads a model folder, a folder of safetensors or a checkpoint '
    'of T5X, writes it in another format, and compares what was written.',
    example='mowe convert google-t5-v1_1-small runs/t5 --to mowe\n'
    'mowe convert runs/t5 t5_for_transformers --to huggingface',
  )
  parser.add_argument(
    'source',
    help='a model folder, a folder of safetensors, or a checkpoint of T5X',
  )
  parser.add_argument('target', help='the folder to write')
  parser.add_argument(
    '--to',
    required=True,
    choices=('mowe', 'safetensors', 'huggingface', 't5x', 't5x-orbax'),
    help='the format to write: a model folder, safetensors of mowe, '
    'safetensors of transformers, or a checkpoint of T5X in one of two layouts',
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    default='float32',
    help='precision of the written weights (default: float32)',
  )
  parser.add_argument(
    '--vocabulary',
    help="a SentencePiece model or 'bytes', if the source has no vocabulary",
  )
  parser.add_argument(
    '--extra_ids',
    type=int,
    help='sentinels that are added to the vocabulary (default: 100, or none if '
    'it has its own)',
  )
  parser.add_argument(
    '--like', help='a folder with the config for a checkpoint of T5X'
  )
  parser.add_argument(
    '--bake',
    action='store_true',
    help="make tables of experts that see a token's row alone (MoLE)",
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
    bake=options.bake,
  )


def _add_inspect(verbs):
  parser = verb_parsers.add(
    verbs,
    'inspect',
    does='show what a model folder holds, and whether it is whole',
    description='Shows the checkpoints of a model folder, whether their files '
    'are as they were written, and when and how the run was started.',
    example='mowe inspect runs/mowe',
  )
  parser.add_argument('folder', help='the MODEL_DIR of a training run')
  parser.set_defaults(run=_inspect)


def _inspect(options, bindings):
  del bindings
  from mowe.model_folders import inspection

  inspection.show(inspection.inspect(options.folder))
