"""Three claims about modules on two domains of text, at small scale.

  python scripts/examples/module_claims.py A_TRAIN A_TEST [B_TRAIN B_TEST]
    [--output FOLDER] [--seeds 0 1]

Domain A and domain B are files of text, .txt or .jsonl, also .gz; without files
B is a generated world. Every step is a `mowe` command, which is printed; one that
is done is not done again, so a stopped run goes on with the same command. Seeds
may be trained beside each other, each by an own process with the same FOLDER; a
last call with all of them collects the results.

- Efficiency: a dense model and one of modules are trained on domain A.
- Extendability: both go on with domain B, whole, and the one of modules also with
  added modules alone; the loss on A is measured before and after.
- Specialisation: the model of modules is finetuned on B, with and without the
  load-concentration loss, and loses the modules that B uses least.

Ends with results.json and results.md.
"""

import argparse
import json
import pathlib
import random
import shlex
import subprocess
import sys

from mowe.data.text import generated_world

_DOMAINS = ('a', 'b')
_FRACTIONS = (0.75, 0.5, 0.25)
_GATES = ('keep', 'renormalise')
_VOCAB = 4096
_WORLD_FILES = ('b_train', 'b_test')
# Held-out documents are about the same people as those of training.
_WORLD_TEST = 1000


def main() -> None:
  """Runs what is not done yet, and writes the results."""
  options = _parse()
  steps = Steps(options)
  results = {}
  for seed in options.seeds:
    results[f'seed {seed}'] = _of_seed(steps, options, seed)
  folder = pathlib.Path(options.output)
  (folder / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
  (folder / 'results.md').write_text(_as_text(results))
  print((folder / 'results.md').read_text())


def _parse():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('a_train')
  parser.add_argument('a_test')
  parser.add_argument('b_train', nargs='?')
  parser.add_argument('b_test', nargs='?')
  parser.add_argument('--output', default='module_claims_output')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
  parser.add_argument('--steps', type=int, default=4000, help='on domain A')
  parser.add_argument('--more_steps', type=int, default=2000, help='on B')
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--length', type=int, default=128)
  parser.add_argument('--dense', default='decoder_only_mini')
  parser.add_argument('--modular', default='moduleformer_mini')
  parser.add_argument('--new_mlp', type=int, default=4)
  parser.add_argument('--new_attention', type=int, default=0)
  parser.add_argument('--takeover', type=float, default=1.0)
  parser.add_argument(
    '--concentrations', type=float, nargs='+', default=[0.03, 0.3]
  )
  parser.add_argument(
    '--fewer_steps', type=int, nargs='+', default=[50, 100],
    help='on B, to forget less',
  )  # fmt: skip
  parser.add_argument(
    '--set', action='append', default=[], help='NAME=VALUE for every training'
  )
  return parser.parse_args()


class Steps:
  """Runs the commands of an experiment, each once."""

  def __init__(self, options):
    self.options = options
    self.folder = pathlib.Path(options.output)
    self.folder.mkdir(parents=True, exist_ok=True)
    self._prepare()

  def run(self, done, *arguments):
    """Runs `mowe` unless the file or folder that it ends with is there."""
    if done.exists():
      return
    command = ['mowe', *map(str, arguments)]
    print('$', shlex.join(command), flush=True)
    subprocess.run(
      [sys.executable, '-m', 'mowe.cli.main', *command[1:]], check=True
    )

  def _prepare(self):
    """Makes a vocabulary of both domains, and four token caches."""
    options = self.options
    files = {'a_train': options.a_train, 'a_test': options.a_test}
    if options.b_train is None:
      files |= self._world()
    else:
      files |= {'b_train': options.b_train, 'b_test': options.b_test}
    self.vocabulary = self.folder / 'vocabulary.model'
    self.run(
      self.vocabulary, 'train-vocabulary', self.vocabulary,
      files['a_train'], files['b_train'], '--size', _VOCAB - 128,
    )  # fmt: skip
    for name, file in files.items():
      cache = self.folder / 'cache' / name
      self.run(
        cache / 'cache.json', 'cache-task', cache, file,
        '--vocabulary', self.vocabulary, '--kind', 'language_model',
      )  # fmt: skip

  def _world(self):
    """Writes the documents of a generated world, in two parts."""
    files = {name: self.folder / f'{name}.jsonl' for name in _WORLD_FILES}
    if not all(file.exists() for file in files.values()):
      world = generated_world.make_world(generated_world.WorldConfig())
      texts = [document['text'] for document in world.documents]
      random.Random(0).shuffle(texts)
      parts = texts[:-_WORLD_TEST], texts[-_WORLD_TEST:]
      for file, part in zip(files.values(), parts, strict=True):
        lines = [json.dumps({'text': text}) + '\n' for text in part]
        file.write_text(''.join(lines))
    return files

  def train(self, target, domain, seed, steps, files, **macros):
    """Trains a model on a domain; returns its folder."""
    folder = self.folder / f'seed_{seed}' / target
    settings = self._data(f'{domain}_train') | {
      'MODEL_DIR': str(folder),
      'TRAIN_STEPS': steps,
      'RANDOM_SEED': seed,
      'SAVE_PERIOD': max(1, steps // 4),
    }
    given = [f'--gin.{item}' for item in self.options.set]
    self.run(
      folder / f'checkpoint_{steps}' / 'manifest.json', 'train',
      *(f'--gin_file=gin_configs/{file}.gin' for file in files),
      *_gin(settings | macros), *given,
    )  # fmt: skip
    return folder

  def losses(self, folder, domains=_DOMAINS):
    """Measures nats per token on the test text of each domain."""
    values = {}
    for domain in domains:
      output = folder / f'{domain}_test'
      settings = self._data(f'{domain}_test') | {
        'CHECKPOINT_PATH': str(folder),
        'EVAL_OUTPUT_DIR': str(output),
      }
      self.run(
        output / 'results.json', 'evaluate',
        '--gin_file=gin_configs/runs/evaluate.gin', *_gin(settings),
      )  # fmt: skip
      values[domain] = json.loads((output / 'results.json').read_text())['loss']
    return values

  def usage(self, folder, domain):
    """Measures which modules the training text of a domain uses."""
    output = folder / f'usage_{domain}'
    settings = self._data(f'{domain}_train') | {
      'CHECKPOINT_PATH': str(folder),
      'USAGE_OUTPUT_DIR': str(output),
      'NUM_BATCHES': 100,
    }
    self.run(
      output / 'usage.png', 'modules', 'usage',
      '--gin_file=gin_configs/runs/modules_usage.gin', *_gin(settings),
    )  # fmt: skip
    return output / 'usage.json'

  def _data(self, name):
    return {
      'MIXTURE_OR_TASK_NAME': name,
      'CACHE_DIR': str(self.folder / 'cache'),
      'TASK_FEATURE_LENGTHS': {'targets': self.options.length},
      'BATCH_SIZE': self.options.batch_size,
    }


def _gin(macros):
  return [f'--gin.{name}={value!r}' for name, value in macros.items()]


def _of_seed(steps, options, seed):
  """Returns all numbers of one seed."""
  results = {'efficiency': {}, 'extendability': {}, 'specialisation': {}}
  trained = {}
  for name, model in (('dense', options.dense), ('modular', options.modular)):
    trained[name] = steps.train(
      f'{name}_a', 'a', seed, options.steps,
      [f'models/{model}', 'optimizers/adamw', 'runs/pretrain_lm'],
      VOCABULARY_PATH=str(steps.vocabulary), VOCAB_SIZE=_VOCAB,
    )  # fmt: skip
    losses = steps.losses(trained[name])
    results['efficiency'][name] = _costs(trained[name]) | {'loss': losses['a']}
    results['extendability'][f'{name}, before'] = losses
  results['extendability'] |= _extended(steps, options, seed, trained)
  results['specialisation'] = _specialised(steps, options, seed, trained)
  return results


def _on_b(steps, seed, before, target, num_steps, concentration=0.0):
  """Continues on domain B, with everything trained."""
  return steps.train(
    target, 'b', seed, num_steps,
    ['optimizers/adamw', 'runs/pretrain_lm', 'modules/concentrated'],
    INITIAL_CHECKPOINT_PATH=str(before), LOAD_CONCENTRATION=concentration,
  )  # fmt: skip


def _extended(steps, options, seed, trained):
  """Returns losses after domain B, with all or added modules alone trained."""
  losses = {}
  for name in ('dense', 'modular'):
    for number in (*options.fewer_steps, options.more_steps):
      is_short = number in options.fewer_steps
      target = f'{name}_b_{number}' if is_short else f'{name}_b'
      folder = _on_b(steps, seed, trained[name], target, number)
      said = f'{name}, all trained on B, {number} steps'
      losses[said] = steps.losses(folder)
  larger = trained['modular'].parent / 'added'
  steps.run(
    larger, 'modules', 'add', trained['modular'], larger, '--seed', seed,
    '--mlp', options.new_mlp, '--attention', options.new_attention,
  )  # fmt: skip
  for target, weight in (('added_b', 0.0), ('added_b_held', options.takeover)):
    folder = steps.train(
      target, 'b', seed, options.more_steps,
      ['optimizers/adamw', 'runs/pretrain_lm', 'modules/added_modules'],
      INITIAL_CHECKPOINT_PATH=str(larger), TAKEOVER=weight,
    )  # fmt: skip
    said = f'modular, added modules trained on B, takeover {weight}'
    losses[said] = steps.losses(folder)
  for domain in _DOMAINS:
    steps.usage(folder, domain)
  return losses


def _specialised(steps, options, seed, trained):
  """Returns losses on domain B of models that lose modules."""
  losses = {}
  # The first model is that of `_extended`.
  for weight in (0.0, *options.concentrations):
    name = f'concentration {weight}'
    target = f'concentrated_{weight}_b' if weight else 'modular_b'
    folder = _on_b(
      steps, seed, trained['modular'], target, options.more_steps, weight
    )
    losses[f'{name}, all modules'] = steps.losses(folder, 'b')['b']
    usage = steps.usage(folder, 'b')
    for fraction in _FRACTIONS:
      for gates in _GATES:
        smaller = folder.parent / f'{folder.name}_{gates}_{fraction}'
        steps.run(
          smaller, 'modules', 'prune', folder, smaller, '--usage', usage,
          '--fraction', fraction, '--gates', gates,
        )  # fmt: skip
        named = f'{name}, {fraction:.0%} of the modules, gates {gates}'
        losses[named] = steps.losses(smaller, 'b')['b']
  return losses


def _costs(folder):
  """Returns the parameters and FLOPs per token of a model.

  `benchmarks.language_models` measures its speed.
  """
  from mowe.model_folders import model_folder
  from mowe.models.families import costs

  config, _ = model_folder.load_config(folder)
  found = costs.model_costs(config)
  return {
    'parameters': found.total_parameters,
    'active': found.active_parameters,
    'flops_per_token': found.flops_per_target_token,
  }


def _as_text(results):
  """Renders tables with a row for each number, and a column for each seed."""
  text = []
  for claim in ('efficiency', 'extendability', 'specialisation'):
    text.append(f'## {claim.capitalize()}\n')
    text.append('| | ' + ' | '.join(results) + ' |')
    text.append('|---|' + '---:|' * len(results))
    for name in next(iter(results.values()))[claim]:
      cells = [_cell(of_seed[claim][name]) for of_seed in results.values()]
      text.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    text.append('')
  return '\n'.join(text)


def _cell(value):
  if isinstance(value, dict):
    return ', '.join(f'{name} {_cell(one)}' for name, one in value.items())
  if value is None:
    return '-'
  return (
    f'{value:.4f}'
    if isinstance(value, float) and value < 100
    else (f'{value:,.0f}')
  )


if __name__ == '__main__':
  main()
