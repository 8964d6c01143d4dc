"""Every gin file can be parsed, and the models are what their text files say.

If a change of a model is meant, `python tests/test_gin_files.py /tmp` writes
tests/golden/parameters_<model>.txt again.
"""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import flax
import jax
import numpy as np
import pytest

from mowe.commands import data_config
from mowe.commands.gin_files import gin_config
from mowe.data.caches import cache_builders, token_counts
from mowe.layers.routers import experts_choose, tokens_choose
from mowe.models import parameters
from mowe.models.decoder_only import decoder_only_config
from mowe.models.families import costs, families, saved_config
from mowe.models.t5 import t5_config
from mowe.training import partitioning
from mowe.words import byte_vocabulary, vocabulary_builder

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_GOLDEN = _ROOT / 'tests' / 'golden'
_MODELS = sorted(p.stem for p in (_ROOT / 'gin_configs' / 'models').iterdir())
_EXPERTS = {'mowe_tiny': 2048, 'mowe_base': 32768, 'mowe_large': 32768}
# These are the public sizes of T5 1.1, from google/t5-v1_1-* and T5X's
# t5_1_1/*.gin.
_RELEASED = {
  't5_small': 76_961_152,
  't5_base': 247_577_856,
  't5_large': 783_150_080,
  't5_xl': 2_849_757_184,
}
# Each model has emb_dim, heads, head_dim, mlp_dim, and layers of each stack,
# from T5X's t5_1_1/*.gin.
_SIZES = {
  't5_tiny': (64, 4, 16, 128, 3),
  't5_small': (512, 6, 64, 1024, 8),
  't5_base': (768, 12, 64, 2048, 12),
  't5_large': (1024, 16, 64, 2816, 24),
  't5_xl': (2048, 32, 64, 5120, 24),
}
_VOCAB = 32128
# This config stands for any, because only its factories are replaced.
_PLAIN = decoder_only_config.DecoderOnlyConfig
# The number of experts in examples/text_pretrain_mowe_1m.gin.
_MILLION = 2**20


def _write_routing(path, num_experts):
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    ['a few words and a few more'],
    byte_vocabulary.ByteVocabulary(),
    num_words=5,
    num_experts=num_experts,
    num_skipped=1,
  )
  routing.save(path)


@pytest.fixture(scope='session')
def routing_paths(tmp_path_factory):
  folder = tmp_path_factory.mktemp('routing')
  paths = {}
  for number in {*_EXPERTS.values(), _MILLION}:
    paths[number] = folder / f'{number}.npz'
    _write_routing(paths[number], number)
  return paths


def _config(name, routing_paths):
  bindings = ["VOCABULARY_PATH = 'bytes'", "DTYPE = 'float32'"]
  gin_config.parse([f'gin_configs/models/{name}.gin'], bindings)
  if '@' in str(gin_config.macro('VOCAB_SIZE')):
    # The published sizes are those with T5's vocabulary.
    bindings.append(f'VOCAB_SIZE = {_VOCAB}')
  if name in _EXPERTS:
    path = routing_paths[_EXPERTS[name]]
    bindings.append(f'ROUTING_VOCABULARY = {str(path)!r}')
  gin_config.parse([f'gin_configs/models/{name}.gin'], bindings)
  return _made('MODEL')


class _Measured(NamedTuple):
  """What the tests know of a model, as their number of blocks takes time."""

  described: str
  cost: costs.ModelCosts


@pytest.fixture(scope='module')
def measured(routing_paths):
  """From the name of a model to what `_measure` says, once for each."""
  return functools.cache(lambda name: _measure(_config(name, routing_paths)))


def _measure(config, num_blocks=4):
  """A line of name, shape and logical axes for each parameter; then a total.

  Tracing a deep model takes seconds. So a stack is traced with its first blocks
  alone, and the others get the parameters of the last one of their kind.
  """
  traced = config if config.memories else _with_blocks(config, num_blocks)
  model = families.build(traced)
  variables = jax.eval_shape(
    lambda key: parameters.initial_variables(model, key), jax.random.key(0)
  )
  variables = _with_all_blocks(variables, traced, config)
  cost = costs.model_costs(config, variables['params'])
  axes = partitioning.parameter_axes(variables['params_axes'])
  leaves = flax.traverse_util.flatten_dict(variables['params'])
  lines, total = [], 0
  mesh = partitioning.make_mesh()
  for path in sorted(leaves):
    leaf = leaves[path]
    total += leaf.size
    assert str(leaf.dtype) == 'float32'
    # Every axis has a place on the mesh, and no mesh axis occurs twice.
    partitioning.sharding_of_axes(axes[path], mesh)
    lines.append(_line('/'.join(path), leaf.shape, axes[path]))
  return _Measured('\n'.join([*lines, f'total {total:,}']) + '\n', cost)


def _with_blocks(config, number):
  """The model with a number of blocks in each stack, or until one is sparse."""
  fields = {}
  for stream, depth in config.depths().items():
    blocks = config.sparse_blocks()[stream]
    few = min(depth, max([number, *(i + 1 for i in blocks[:1])]))
    fields[f'sparse_{stream}_layers'] = tuple(i for i in blocks if i < few)
    field = f'num_{stream}_layers' if len(config.depths()) > 1 else 'num_layers'
    fields[field] = few
  return dataclasses.replace(config, **fields)


def _with_all_blocks(variables, traced, config):
  """The variables of `config`, from those of the same model with few blocks."""
  variables = flax.core.unfreeze(variables)
  for stream, depth in config.depths().items():
    few, is_sparse = traced.depths()[stream], config.sparse_blocks()[stream]
    for i in range(few, depth):
      alike = [j for j in range(few) if (j in is_sparse) == (i in is_sparse)]
      for name in ('params', 'params_axes'):
        blocks = variables[name][stream]
        blocks[f'layers_{i}'] = blocks[f'layers_{alike[-1]}']
  return variables


def _line(name, shape, axes):
  return f'{name} {tuple(shape)} {" ".join(axes)}'


@pytest.mark.slow
@pytest.mark.parametrize('name', _MODELS)
def test_parameters_of_a_model_are_those_of_its_text_file(name, measured):
  expected = (_GOLDEN / f'parameters_{name}.txt').read_text()
  assert measured(name).described == expected


def test_every_text_file_has_a_model():
  found = sorted(
    path.stem.removeprefix('parameters_')
    for path in _GOLDEN.glob('parameters_*.txt')
  )
  assert found == _MODELS


@pytest.mark.parametrize('name', _SIZES)
def test_text_files_of_t5_are_the_tree_of_t5x(name):
  """Names, shapes and axes are those of a released checkpoint."""
  embed, heads, head_dim, mlp, depth = _SIZES[name]
  joined = heads * head_dim
  expected = {
    'token_embedder/embedding': ((_VOCAB, embed), 'vocab embed'),
    'encoder/encoder_norm/scale': ((embed,), 'embed'),
    'decoder/decoder_norm/scale': ((embed,), 'embed'),
    'decoder/logits_dense/kernel': ((embed, _VOCAB), 'embed vocab'),
  }

  def add_norm(path):
    expected[f'{path}/scale'] = ((embed,), 'embed')

  def add_attention(path):
    for part in ('query', 'key', 'value'):
      expected[f'{path}/{part}/kernel'] = ((embed, joined), 'embed joined_kv')
    expected[f'{path}/out/kernel'] = ((joined, embed), 'joined_kv embed')

  for stack in ('encoder', 'decoder'):
    expected[f'{stack}/relpos_bias/rel_embedding'] = (
      (heads, 32),
      'heads relpos_buckets',
    )
    for i in range(depth):
      layer = f'{stack}/layers_{i}'
      for part in ('wi_0', 'wi_1'):
        expected[f'{layer}/mlp/{part}/kernel'] = ((embed, mlp), 'embed mlp')
      expected[f'{layer}/mlp/wo/kernel'] = ((mlp, embed), 'mlp embed')
      add_norm(f'{layer}/pre_mlp_layer_norm')
      if stack == 'encoder':
        add_norm(f'{layer}/pre_attention_layer_norm')
        add_attention(f'{layer}/attention')
      else:
        add_norm(f'{layer}/pre_self_attention_layer_norm')
        add_norm(f'{layer}/pre_cross_attention_layer_norm')
        add_attention(f'{layer}/self_attention')
        add_attention(f'{layer}/encoder_decoder_attention')

  *lines, total = (_GOLDEN / f'parameters_{name}.txt').read_text().splitlines()
  assert sorted(lines) == sorted(
    f'{path} {shape} {axes}' for path, (shape, axes) in expected.items()
  )
  if name in _RELEASED:
    assert total == f'total {_RELEASED[name]:,}'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'billions', 'dense'),
  # The billions are those of the paper. Four of T5's dense feed-forwards are
  # replaced.
  [('mowe_base', 31.0, 't5_base'), ('mowe_large', 45.5, 't5_large')],
)
def test_mowe_has_the_size_of_the_paper(
  name, billions, dense, routing_paths, measured
):
  config, cost = _config(name, routing_paths), measured(name).cost
  assert cost.total_parameters / 1e9 == pytest.approx(billions, abs=0.1)
  rest = cost.total_parameters - cost.expert_parameters
  assert rest == _RELEASED[dense] - 4 * 3 * config.emb_dim * config.mlp_dim
  assert len(config.sparse_encoder_layers) == 2
  assert len(config.sparse_decoder_layers) == 2
  # All four layers read one table of 32K experts.
  layer = config.make_sparse_layers()[0]
  assert cost.expert_parameters == (
    32768 * 3 * config.emb_dim * layer.expert_dim
  )


def test_tiny_models_cost_the_same(measured):
  dense, sparse = (measured(name).cost for name in ('t5_tiny', 'mowe_tiny'))
  assert sparse.flops_per_input_token == dense.flops_per_input_token
  assert sparse.flops_per_target_token == dense.flops_per_target_token
  assert sparse.total_parameters > 3 * dense.total_parameters


# Each size has the layers with experts in each stack, and the experts of a
# layer.
_MOE = {
  'moe_switch': {'base': (6, 128), 'large': (12, 128), 'tiny': (1, 8)},
  'moe_top2': {'base': (3, 64), 'large': (6, 64), 'tiny': (1, 8)},
  'moe_expert_choice': {'base': (6, 64), 'large': (12, 64), 'tiny': (1, 8)},
  'moe_hash': {'base': (6, 128), 'large': (12, 128), 'tiny': (1, 8)},
}


def test_mixtures_of_experts_have_all_sizes():
  names = {f'{kind}_{size}' for kind, sizes in _MOE.items() for size in sizes}
  assert names == {name for name in _MODELS if name.startswith('moe_')}


@pytest.mark.slow
@pytest.mark.parametrize('size', ['tiny', 'base', 'large'])
@pytest.mark.parametrize('kind', _MOE)
def test_a_mixture_of_experts_is_t5_and_experts(
  kind, size, routing_paths, measured
):
  num_layers, num_experts = _MOE[kind][size]
  dense = measured(f't5_{size}').cost
  config = _config(f'{kind}_{size}', routing_paths)
  assert len(config.sparse_encoder_layers) == num_layers
  assert len(config.sparse_decoder_layers) == num_layers
  cost = measured(f'{kind}_{size}').cost
  width = config.make_sparse_layers()[0].expert_dim
  expert, mlp = 3 * config.emb_dim * width, 3 * config.emb_dim * config.mlp_dim
  router = 0 if kind == 'moe_hash' else config.emb_dim * num_experts
  both = 2 * num_layers
  assert cost.expert_parameters == both * num_experts * expert
  assert cost.total_parameters == (
    dense.total_parameters + both * (num_experts * expert + router - mlp)
  )
  if size == 'tiny':
    # The FLOPs are those of T5, plus those of the routers in each stack.
    more = 2 * num_layers * router
    assert cost.flops_per_input_token == dense.flops_per_input_token + more
    assert cost.flops_per_target_token == dense.flops_per_target_token + more
  else:
    assert width == config.mlp_dim


@pytest.mark.slow
@pytest.mark.parametrize('size', ['tiny', 'base'])
@pytest.mark.parametrize('kind', ['sigma_moe', 'top_k', 'pkm'])
def test_feed_forwards_of_equal_parameters(kind, size, routing_paths, measured):
  dense, cost = measured(f't5_{size}').cost, measured(f'{kind}_{size}').cost
  config = _config(f'{kind}_{size}', routing_paths)
  blocks = config.num_encoder_layers + config.num_decoder_layers
  mlp = 3 * config.emb_dim * config.mlp_dim
  more = cost.total_parameters - dense.total_parameters
  layer = config.make_sparse_layers()[0]
  if kind == 'sigma_moe':
    router = config.emb_dim * layer.num_experts
    assert more == blocks * router
    # Of N equal parts a token reads K.
    rest = mlp - mlp * layer.routing.k // layer.num_experts
    assert dense.flops_per_input_token - cost.flops_per_input_token == (
      2 * config.num_encoder_layers * (rest - router)
    )
  elif kind == 'top_k':
    assert more == 0
    assert cost.flops_per_input_token == dense.flops_per_input_token
  else:
    # The number of keys is the square that is nearest to the FLOPs of the MLP.
    n, _ = layer.num_keys()
    assert more == blocks * (n * (n + 4) * config.emb_dim - mlp)
    assert (n - 1) * (n + 3) < mlp // config.emb_dim < (n + 1) * (n + 5)


@pytest.mark.parametrize('name', _MODELS)
def test_a_model_of_a_gin_file_can_be_saved(name, routing_paths):
  config = _config(name, routing_paths)
  tree = json.loads(json.dumps(saved_config.to_json(config)))
  again = saved_config.from_json(tree, config.routing)
  assert again.parts() == config.parts()
  blocks = {f'sparse_{stream}_layers': () for stream in config.streams}
  # Factories are made again by each reading, so they are other objects.
  made = ('attention', 'norm', 'sparse_feed_forward')
  made = (*made, 'sparse_decoder_feed_forward')
  made = (*made, 'encoder_attention', 'decoder_attention')
  fields = {field.name for field in dataclasses.fields(config)}
  factories = {name: getattr(_PLAIN, name, None) for name in made}
  factories = {k: v for k, v in factories.items() if k in fields}
  # Payloads have factories as well.
  factories['memories'] = ()
  assert saved_config.to_json(again) == tree
  assert dataclasses.replace(again, **factories, **blocks) == (
    dataclasses.replace(config, **factories, **blocks)
  )


def test_only_encoders_prioritize(routing_paths):
  config = _config('moe_top2_base', routing_paths)
  encoder, decoder = config.make_sparse_layers()
  assert encoder.routing.batch_prioritized
  assert not decoder.routing.batch_prioritized
  assert encoder.routing.k == decoder.routing.k == 2
  encoder, decoder = _config(
    'moe_expert_choice_tiny', routing_paths
  ).make_sparse_layers()
  assert encoder.routing == experts_choose.ExpertsChoose(2.0)
  assert decoder.routing == tokens_choose.TokensChoose(2, renormalize=True)


def test_balanced_hash_gives_all_experts_as_many_tokens(tmp_path):
  texts = [{'text': 'the words of a text, and the letters of the words'}]
  vocabulary = byte_vocabulary.ByteVocabulary()
  cache_builders.cache_text(texts, tmp_path / 'text', vocabulary)
  gin_config.parse(
    ['gin_configs/models/moe_hash_tiny.gin']
    + ['gin_configs/routers/balanced_hash.gin'],
    ["VOCABULARY_PATH = 'bytes'", 'VOCAB_SIZE = 384']
    + [f'COUNTED_CACHE = {str(tmp_path / "text")!r}'],
  )
  config = gin_config.call(t5_config.T5Config)
  encoder, decoder = config.make_sparse_layers()
  table = encoder.routing.table
  # The table is one object, so the cache was counted only once.
  assert decoder.routing.table is table
  assert len(table) == 384 and set(table) == set(range(8))
  counts = token_counts.count_tokens(tmp_path / 'text', 384)
  loads = np.bincount(table, np.maximum(counts, 1))
  assert loads.max() <= counts.max() + loads.mean()
  assert loads.max() - loads.min() <= 1


def _names(folder):
  return sorted(
    path.relative_to(_ROOT).as_posix()
    for path in (_ROOT / 'gin_configs' / folder).rglob('*.gin')
  )


_REQUIRED = {
  'VOCABULARY_PATH': 'bytes',
  'MODEL_DIR': 'runs/a',
  'INITIAL_CHECKPOINT_PATH': 'runs/b',
  'CHECKPOINT_PATH': 'runs/a',
  'MIXTURE_OR_TASK_NAME': 'text',
  'EVAL_TASK_NAME': 'questions',
  'EVAL_OUTPUT_DIR': 'runs/eval',
  'INFER_OUTPUT_DIR': 'runs/infer',
  'USAGE_OUTPUT_DIR': 'runs/usage',
  'TASK_FEATURE_LENGTHS': {'inputs': 5, 'targets': 4},
  'TRAIN_STEPS': 30,
}


def _parse(files, routing_paths):
  """Parses files with only the macros that they require and know."""
  gin_config.parse(files)
  text = gin_config.gin.config_str(max_line_length=1000)
  required = re.findall(r'^([A-Z_]+) = %gin.REQUIRED$', text, re.MULTILINE)
  values = {k: v for k, v in _REQUIRED.items() if k in required}
  if 'CHECKPOINT_PATH' in required:
    # Otherwise the lengths are those with which this checkpoint was trained.
    values['TASK_FEATURE_LENGTHS'] = _REQUIRED['TASK_FEATURE_LENGTHS']
  if 'TASK_FEATURE_LENGTHS' in required and '_lm' in files[-1]:
    values['TASK_FEATURE_LENGTHS'] = {'targets': 4}
  if 'ROUTING_VOCABULARY' in required:
    values['ROUTING_VOCABULARY'] = str(routing_paths[_MILLION])
  gin_config.parse(files, [f'{k} = {v!r}' for k, v in values.items()])


def test_other_programs_read_the_files_from_anywhere(tmp_path):
  """T5X's commands have gin's own readers, one of which imports packages."""
  script = (
    'import gin\n'
    f'gin.add_config_file_search_path({str(_ROOT)!r})\n'
    f'gin.parse_config_file({str(_ROOT / "gin_configs/models/mowe_tiny.gin")!r})'
  )
  path = os.pathsep.join([str(_ROOT), os.environ.get('PYTHONPATH', '')])
  subprocess.run(
    [sys.executable, '-c', script],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': path},
    check=True,
  )


def _made(name):
  """The value of a macro; gin calls a reference when it is copied."""
  return copy.deepcopy(gin_config.macro(name))


def _complete(file):
  """The file, after the files that its header asks for."""
  text = (_ROOT / file).read_text()
  parts = [file]
  if file.endswith('trained_experts.gin'):
    parts.insert(0, 'gin_configs/runs/finetune.gin')
  if 'runs/' in file:
    parts.insert(0, 'gin_configs/optimizers/adamw.gin')
  if 'gin_configs/models/' not in text:
    name = 'decoder_only_tiny' if '_lm' in file else 'mowe_tiny'
    parts.insert(0, f'gin_configs/models/{name}.gin')
  return parts


@pytest.mark.slow
@pytest.mark.parametrize('file', _names('runs') + _names('examples'))
def test_a_run_parses_and_its_parts_can_be_made(file, routing_paths):
  alone = {
    f'gin_configs/runs/{name}.gin'
    for name in ('evaluate', 'infer', 'modules_usage')
  }
  # Its model is that of a folder.
  alone.add('gin_configs/examples/text_finetune_saved.gin')
  _parse([file] if file in alone else _complete(file), routing_paths)
  data = gin_config.call(data_config.DataConfig)
  names = {'targets'} if '_lm' in file else {'inputs', 'targets'}
  assert data.batch_size > 0 and set(data.task_feature_lengths) == names
  if file in alone:
    return
  model = (
    decoder_only_config.DecoderOnlyConfig
    if '_lm' in file
    else t5_config.T5Config
  )
  assert isinstance(_made('MODEL'), model)
  # A macro that nothing reads could be set without effect.
  for name in ('OPTIMIZER', 'ROW_OPTIMIZER', 'OBJECTIVE'):
    assert _made(name) is not None
  assert _made('TRAIN_STEPS') > 0


@pytest.mark.parametrize('file', _names(''))
def test_a_header_says_what_a_file_is(file):
  first = (_ROOT / file).read_text().splitlines()[0]
  assert first.startswith('# ') and len(first) > 10


@pytest.mark.parametrize('file', _names('examples'))
def test_a_header_names_what_a_complete_run_needs(file):
  header = (_ROOT / file).read_text().split('from __gin__')[0]
  needs = ' '.join(header.replace('#', ' ').split()).partition('It needs ')[2]
  gin_config.parse([file])
  lines = gin_config.given_values()
  given = {name for name, _, value in (x.partition(' = ') for x in lines)}
  read = {name for x in lines for name in re.findall('%([A-Z][A-Z0-9_]+)', x)}
  required = {x.removesuffix(' = %gin.REQUIRED') for x in lines} & given
  needed = required | read - given
  # Files that another file completes say so, and so do those that continue the
  # run of another file.
  if 'MODEL' in needed or 'Include a file' in header or 'same macros' in needs:
    return
  # A header may also name what fits few runs as it stands, such as VOCAB_SIZE.
  assert needed <= {*re.findall('[A-Z][A-Z0-9_]+', needs)}


@pytest.mark.parametrize('file', _names('optimizers'))
def test_an_optimizer_has_both_parts(file, routing_paths):
  # A file with only a row optimizer must follow one with both optimizers.
  both = ['gin_configs/optimizers/adamw.gin'] if 'rows_' in file else []
  _parse([*both, file], routing_paths)
  _made('OPTIMIZER').build({'scale': ('embed',)})
  rate = _made('ROW_OPTIMIZER').learning_rate
  assert (rate(10) if callable(rate) else rate) > 0


@pytest.mark.parametrize('file', _names('stores'))
def test_a_store_replaces_the_device(file, routing_paths):
  name = pathlib.Path(file).stem
  for run in ('pretrain', 'evaluate', 'infer'):
    files = _complete(f'gin_configs/runs/{run}.gin')
    _parse([*(files if run == 'pretrain' else files[-1:]), file], routing_paths)
    store = _made('EXPERT_STORE')
    assert type(store).__name__ == f'{name.title()}Store'
    assert store.num_slots is None


def test_a_million_experts_lie_on_disk_in_bfloat16(routing_paths):
  _parse(['gin_configs/examples/text_pretrain_mowe_1m.gin'], routing_paths)
  layer, _ = _made('MODEL').make_sparse_layers()
  assert (layer.num_experts, layer.table_dtype) == (_MILLION, 'bfloat16')
  assert type(_made('EXPERT_STORE')).__name__ == 'DiskStore'


def test_dropout_is_off_in_pretraining_and_on_in_finetuning(routing_paths):
  for run, rate in (('pretrain', 0.0), ('finetune', 0.1)):
    _parse(_complete(f'gin_configs/runs/{run}.gin'), routing_paths)
    assert _made('MODEL').dropout_rate == rate


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  folder = pathlib.Path(sys.argv[1])
  written = {n: folder / f'{n}.npz' for n in set(_EXPERTS.values())}
  for number, path in written.items():
    _write_routing(path, number)
  for model in _MODELS:
    target = _GOLDEN / f'parameters_{model}.txt'
    whole = _measure(_config(model, written), num_blocks=1000)
    target.write_text(whole.described)
