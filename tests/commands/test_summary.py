"""Tests the printed table: parameters in all, active per token, and frozen."""

import dataclasses
import functools
import itertools
import types

import jax
import numpy as np
import pytest

from mowe.commands import summary
from mowe.data import batch_source
from mowe.layers.mixtures import moe
from mowe.layers.routers import added_modules, tokens_choose
from mowe.models import parameters
from mowe.models.t5 import t5
from mowe.training.optimization import modules_training, optimizers


class _NoBatches(batch_source.BatchSource):
  def from_step(self, first_step=0):
    return itertools.repeat({})


def _rows(capsys, config, freeze_experts, optimizer=optimizers.AdamW(1e-3)):
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )
  params, tables = parameters.split_tables(variables['params'])
  summary.show(
    types.SimpleNamespace(params=params, tables=tables),
    types.SimpleNamespace(mixture_or_task_name='text'),
    _NoBatches(),
    jax.sharding.Mesh(jax.devices()[:1], ('data',)),
    config,
    freeze_experts,
    optimizer,
  )
  rows = {}
  for line in capsys.readouterr().out.splitlines():
    cells = [cell.strip() for cell in line.split('│')[1:-1]]
    if len(cells) == 4:
      rows[cells[0]] = [int(cell.replace(',', '')) for cell in cells[1:]]
  return rows


@pytest.mark.parametrize('freeze_experts', [False, True])
def test_rows_add_up_and_only_tables_are_frozen(world, capsys, freeze_experts):
  mixture = world.config(
    sparse=False,
    sparse_feed_forward=functools.partial(
      moe.MoeLayer, 4, 14, routing=tokens_choose.TokensChoose(2)
    ),
    sparse_encoder_layers=(0,),
    sparse_decoder_layers=(0,),
  )
  rows = _rows(capsys, mixture, freeze_experts)
  # There are two layers of four experts with three kernels each. A token meets
  # two experts of a layer.
  kernel = 12 * 14
  assert rows['experts'] == [2 * 4 * 3 * kernel, 2 * 2 * 3 * kernel, 0]
  total = rows.pop('all')
  assert total == [sum(column) for column in zip(*rows.values(), strict=True)]

  rows = _rows(capsys, world.config(), freeze_experts)
  stored = rows['experts'][0]
  assert rows['experts'][2] == rows['all'][2] == stored * freeze_experts


def test_what_an_optimizer_leaves_as_it_is_counts_as_frozen(world, capsys):
  routing = added_modules.AddedChoose(tokens_choose.TokensChoose(2), num_old=4)
  config = world.config(
    sparse=False,
    sparse_feed_forward=functools.partial(moe.MoeLayer, 7, 14, routing=routing),
    sparse_encoder_layers=(0,),
  )
  adam = optimizers.AdamW(0.1)
  rows = _rows(capsys, config, False, modules_training.TrainAdded(adam, config))
  # Three of the seven modules are trained, and their columns of the router.
  module = 3 * 12 * 14
  assert rows['experts'] == [7 * module, 3 * module, 4 * module]
  assert rows['all'][0] - rows['all'][2] == 3 * module + 3 * 12
  assert rows['decoder/layers_0'][0] == rows['decoder/layers_0'][2]

  also = modules_training.TrainAdded(adam, config, also='decoder/layers_0/.*')
  assert _rows(capsys, config, False, also)['decoder/layers_0'][2] == 0
  frozen = optimizers.Freeze(adam, 'token_embedder/.*')
  rows = _rows(capsys, config, False, frozen)
  assert (
    rows['all'][2] == rows['token_embedder'][2] == rows['token_embedder'][0]
  )


def test_how_even_blocks_of_experts_are(world, capsys):
  routing = world.routing
  counts = np.where(np.arange(routing.num_words) < 10, 100, 1)
  routing = dataclasses.replace(routing, counts=counts).with_experts(
    8, num_skipped=0
  )
  # The ten frequent words give experts 0 and 1 two words each, and the others
  # one word each.
  seen = np.array([6, 2, 1, 1, 1, 1, 1, 1])

  def shown(num_blocks, seen=seen):
    mesh = jax.sharding.Mesh(
      np.array(jax.devices()[:num_blocks]).reshape(1, -1), ('data', 'expert')
    )
    summary.show_experts(routing, seen, mesh)
    return capsys.readouterr().out

  assert shown(1) == ''
  text = shown(2)
  shares = routing.loads().shares
  expected = 2 * shares[:4].sum() / shares.sum()
  assert text.startswith(
    f'Experts    2 blocks of 4; the busiest has {expected:.2f} times the mean '
    'load by the counts of words, 1.43 times in trial batches\n'
  )
  assert ('--num_blocks' in text) == (expected > 1.2)
  # With one expert in each block, the busiest block has far more than the mean.
  assert repr(routing.word(0)) in shown(8)
