"""The table of parameters: what is stored, met by a token, and frozen."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from mowe.commands import summary
from mowe.layers import moe, tokens_choose
from mowe.models import parameters, t5


def _rows(capsys, config, freeze_experts):
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )
  params, tables = parameters.split_tables(variables['params'])
  summary.show(
    types.SimpleNamespace(params=params, tables=tables),
    types.SimpleNamespace(mixture_or_task_name='text'),
    lambda step: {},
    jax.sharding.Mesh(jax.devices()[:1], ('data',)),
    config,
    freeze_experts,
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
  # Two layers of four experts of three kernels, two of which a token meets.
  kernel = 12 * 14
  assert rows['experts'] == [2 * 4 * 3 * kernel, 2 * 2 * 3 * kernel, 0]
  total = rows.pop('all')
  assert total == [sum(column) for column in zip(*rows.values(), strict=True)]

  rows = _rows(capsys, world.config(), freeze_experts)
  stored = rows['experts'][0]
  assert rows['experts'][2] == rows['all'][2] == stored * freeze_experts


def test_how_even_blocks_of_experts_are(world, capsys):
  routing = world.routing
  counts = np.where(np.arange(routing.num_words) < 10, 100, 1)
  routing = dataclasses.replace(routing, counts=counts).with_experts(
    8, num_skipped=0
  )
  # Of ten frequent words experts 0 and 1 have two each, the others one.
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
  # With a block for each expert the busiest are more than the mean.
  assert repr(routing.word(0)) in shown(8)
