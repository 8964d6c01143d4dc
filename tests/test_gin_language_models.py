"""The models of arXiv 2310.10837 and 2306.04640 have the published sizes."""

import copy
import dataclasses
import pathlib
import re

import flax
import jax
import numpy as np
import pytest

from mowe.commands.gin_files import gin_config
from mowe.models.families import costs
from mowe.training import router_training, training_step

# The parameters of one feed-forward, and the millions of the whole model.
_DENSE = {
  'wt103_small': (1_694_137, 47),
  'wt103_big': (8_422_414, 262),
  'enwik8': (2_104_837, 41),
}
# Each model has emb_dim, blocks, heads, head_dim, hidden units, memory and
# vocabulary.
_SIZES = {
  'wt103_small': (412, 16, 10, 41, 2053, 256, 8000),
  'wt103_big': (1024, 18, 16, 64, 4110, 512, 8000),
  'enwik8': (512, 12, 8, 64, 2053, 512, 259),
}


_GOLDEN = pathlib.Path(__file__).resolve().parent / 'golden'
_RUN = ('optimizers/adamw', 'runs/pretrain_lm')
_BINDINGS = ("VOCABULARY_PATH = 'bytes'", "DTYPE = 'float32'")


def _config(name):
  gin_config.parse([f'gin_configs/models/{name}.gin'], _BINDINGS)
  return copy.deepcopy(gin_config.macro('MODEL'))


def _router_loss(needed, *files):
  """The router loss that `mowe train` adds, with a macro that files need."""
  names = ['MODEL_DIR', 'MIXTURE_OR_TASK_NAME', needed]
  gin_config.parse(
    [f'gin_configs/{file}.gin' for file in files],
    [
      *(f"{name} = 'bytes'" for name in names),
      "TASK_FEATURE_LENGTHS = {'targets': 8}",
      'TRAIN_STEPS = 1',
    ],
  )
  return gin_config.call(training_step.LossConfig).router


def _params(name):
  """The shapes of the parameters of a model, from its text file.

  The model itself is compared with that file in test_gin_files.py, and tracing
  it takes seconds.
  """
  path = _GOLDEN / f'parameters_{name}.txt'
  *lines, _ = path.read_text('utf-8').splitlines()
  shapes = {}
  for line in lines:
    parameter, sizes = re.match(r'(\S+) \(([^)]*)\)', line).groups()
    shape = tuple(int(size) for size in sizes.split(',') if size)
    shapes[parameter] = jax.ShapeDtypeStruct(shape, np.float32)
  return flax.traverse_util.unflatten_dict(shapes, sep='/')


def _costs(name):
  config = _config(name)
  return costs.model_costs(config, _params(name))


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize('name', _SIZES)
def test_a_dense_model_has_the_published_size(name):
  embed, blocks, heads, kv, hidden, memory, vocab = _SIZES[name]
  config = _config(f'xl_{name}')
  assert (config.emb_dim, config.num_layers) == (embed, blocks)
  assert (config.num_heads, config.head_dim) == (heads, kv)
  assert (config.memory_length, config.vocab_size) == (memory, vocab)
  assert config.sparse_layers()['decoder'].mlp_dim == hidden
  params = _params(f'xl_{name}')
  of_layer, millions = _DENSE[name]
  for number in range(blocks):
    assert _count(params['decoder'][f'layers_{number}']['mlp']) == of_layer
  # These are the kernels of query, key, value, output and distances, and the
  # biases of each head for keys and for distances.
  attention = 5 * embed * heads * kv + 2 * heads * kv
  block = of_layer + attention + 4 * embed
  total = blocks * block + 2 * embed + 2 * vocab * embed + vocab
  assert costs.model_costs(config, params).total_parameters == total
  assert round(total / 1e6) == millions


# Each model has its experts, the parameters of one feed-forward, the millions
# of the whole model, and the dense model of the same size.
_SIGMA = {
  'wt103_small': (16, 1_694_144, 47, 'wt103_small'),
  'wt103_small_128': (128, 13_553_152, 237, 'wt103_small'),
  'wt103_big': (32, 8_421_376, 262, 'wt103_big'),
  'enwik8': (16, 2_105_344, 41, 'enwik8'),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', _SIGMA)
def test_a_sigma_moe_is_the_dense_model_with_other_layers(name):
  experts, of_layer, millions, twin = _SIGMA[name]
  dense = _config(f'xl_{twin}')
  # A config makes layers with what gin has read last, so the order matters.
  attention = dense.make_attention()
  others = _costs(f'xl_{twin}').total_parameters
  others -= dense.num_layers * _DENSE[twin][0]
  config = _config(f'xl_sigma_moe_{name}')
  layer = config.sparse_layers()['decoder']
  assert (layer.num_experts, layer.expert_dim) == (experts, 128)
  assert layer.routing.k == 4 and layer.routing.sigmoid
  assert layer.initialization.num_layers == config.num_layers
  params = _params(f'xl_sigma_moe_{name}')
  for number in range(config.num_layers):
    assert _count(params['decoder'][f'layers_{number}']['mlp']) == of_layer
  total = costs.model_costs(config, params).total_parameters
  assert total == others + config.num_layers * of_layer
  assert round(total / 1e6) == millions
  # All other fields are those of the dense model.
  factories = {'attention': None, 'norm': None, 'sparse_feed_forward': None}
  parts = {'sparse_decoder_layers': ()} | factories
  parts |= {'attention': type(config.make_attention())}
  assert config.make_attention() == attention
  assert dataclasses.replace(config, **parts) == (
    dataclasses.replace(dense, **parts)
  )


# The number of values, and the parameters of one feed-forward.
_PRODUCT_KEYS = {
  'wt103_small': (62**2, 1_685_904),
  'wt103_big': (89**2, 8_475_648),
  'enwik8': (62**2, 2_095_104),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', _SIZES)
@pytest.mark.parametrize('kind', ['pkm', 'top_k'])
def test_other_layers_have_the_parameters_of_the_dense_ones(kind, name):
  config = _config(f'xl_{kind}_{name}')
  layer = config.sparse_layers()['decoder']
  of_layer = _DENSE[name][0]
  if kind == 'pkm':
    values, of_layer = _PRODUCT_KEYS[name]
    assert (layer.num_values, layer.num_heads) == (values, 4)
    assert layer.num_layers == config.num_layers
  else:
    assert (layer.mlp_dim, layer.k) == (_SIZES[name][4], 128)
  params = _params(f'xl_{kind}_{name}')
  for number in range(config.num_layers):
    assert _count(params['decoder'][f'layers_{number}']['mlp']) == of_layer


@pytest.mark.parametrize(
  ('name', 'entropy', 'excluded'),
  [
    ('wt103_small', 0.001, 0.0),
    ('wt103_small_128', 0.001, 0.05),
    ('wt103_big', 0.001, 0.1),
    ('enwik8', 0.0001, 0.05),
  ],
)
def test_regularisers_are_those_of_the_code_of_the_paper(
  name, entropy, excluded
):
  config = _config(f'xl_sigma_moe_{name}')
  routing = config.sparse_layers()['decoder'].routing
  assert routing.exclusion_rate == excluded
  loss = _router_loss('VOCABULARY_PATH', f'models/xl_sigma_moe_{name}', *_RUN)
  assert (loss.entropy, loss.load_balance) == (entropy, 0)
  assert gin_config.call(training_step.LossConfig).z_loss == 0


@pytest.mark.parametrize('name', [*_SIZES, 'tiny'])
def test_fresh_kernels_have_the_variance_of_the_paper(name):
  """It is 2 / (blocks * inputs), and for embeddings that of Xavier's draw."""
  config = _config(f'xl_{name}')
  scale = 2 / config.num_layers
  assert config.make_attention().init_scale == pytest.approx(scale, rel=1e-5)
  layer = config.sparse_layers()['decoder']
  assert layer.init_scale == pytest.approx(scale, rel=1e-5)
  if name != 'tiny':
    xavier = (2 / (config.vocab_size + config.emb_dim)) ** 0.5
    assert config.embedding_stddev == pytest.approx(xavier, rel=5e-3)


@pytest.mark.parametrize(
  'name', ['wikitext103_small', 'wikitext103_big', 'enwik8']
)
def test_a_run_remembers_one_row(name):
  model = name.replace('wikitext', 'wt')
  gin_config.parse(
    [
      f'gin_configs/models/xl_{model}.gin',
      f'gin_configs/examples/{name}_lm.gin',
    ],
    ["VOCABULARY_PATH = 'bytes'"],
  )
  config = copy.deepcopy(gin_config.macro('MODEL'))
  lengths = gin_config.macro('TASK_FEATURE_LENGTHS')
  assert lengths == {'targets': config.memory_length}
  assert config.dropout_rate == (0.2 if 'big' in name else 0.1)
  # In evaluation the paper's memory is four rows long.
  longer = dataclasses.replace(config, memory_length=4 * lengths['targets'])
  memory = jax.eval_shape(lambda: longer.initial_memory(1))
  assert memory['decoder']['real'].shape == (1, 4 * lengths['targets'])


# Each model has blocks, choices, millions of parameters, and the millions that
# a token meets in its blocks.
_MODULE_FORMERS = {
  '350m_4b': (24, 2, 4142.5, 315),
  '700m_4b': (24, 4, 4142.5, 617),
  '700m_8b': (48, 2, 8182.0, 630),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', _MODULE_FORMERS)
def test_a_module_former_has_the_published_size(name):
  blocks, k, millions, active = _MODULE_FORMERS[name]
  config = _config(f'moduleformer_{name}')
  heads, mlp = config.make_attention(), config.sparse_layers()['decoder']
  assert (heads.num_experts, mlp.num_experts) == (16, 32)
  assert heads.routing.k == mlp.routing.k == k
  assert config.sparse_decoder_layers == tuple(range(blocks))
  assert (config.emb_dim, config.vocab_size) == (1024, 50295)
  cost = costs.model_costs(config, _params(f'moduleformer_{name}'))
  assert round(cost.total_parameters / 1e6, 1) == millions
  of_vocabulary = 2 * config.emb_dim * config.vocab_size
  assert round((cost.active_parameters - of_vocabulary) / 1e6) == active


@pytest.mark.slow
def test_the_mini_models_have_as_many_parameters_as_the_dense_one():
  dense = _costs('xl_mini')
  assert dense.total_parameters == 3_443_276
  # Each kind has its parameters, and its share of the dense model's FLOPs per
  # token.
  for kind, expected, share in [
    ('top_k', 3_443_276, 1.0),
    ('pkm', 3_421_760, 0.984),
    # The paper's count leaves out the router and has 0.25.
    ('sigma_moe', 3_443_776, 0.257),
    ('switch', 3_437_632, 0.252),
  ]:
    cost = _costs(f'xl_{kind}_mini')
    assert cost.total_parameters == expected, kind
    saved = dense.flops_per_target_token - cost.flops_per_target_token
    of_dense = 2 * 4 * 2 * 128 * 1027
    assert 1 - saved / of_dense == pytest.approx(share, abs=0.003), kind


def test_router_losses_of_gin_files_reach_the_training():
  expected = router_training.RouterLossConfig
  for model, loss in [
    ('xl_switch_mini', expected(load_balance=0.01)),
    ('moe_switch_tiny', expected(load_balance=0.01)),
    ('moduleformer_tiny', expected(0.0, mutual_information=2e-4)),
  ]:
    found = _router_loss('VOCABULARY_PATH', f'models/{model}', *_RUN)
    assert found == loss, model
  for modules, loss in [
    ('concentrated', expected(0.0, load_concentration=0.01)),
    ('added_modules', expected(0.0, takeover=0.0)),
  ]:
    needed = 'INITIAL_CHECKPOINT_PATH'
    assert _router_loss(needed, *_RUN, f'modules/{modules}') == loss, modules
