"""Tests names of topologies; those in *_compiled_for.py compile for them.

Also tests `chips`.
"""

import importlib.util

import pytest

from mowe.training.compiling import chips, compile_ahead

Topology = compile_ahead.Topology


def test_names_of_topologies():
  assert Topology.parse('v5p:2x2x4').shape == (2, 2, 4)
  assert Topology.parse('v5e:4x8').chip is chips.CHIPS['v5e']
  assert Topology.parse('h100:1x1x8').chip.platform == 'gpu'


@pytest.mark.parametrize(
  'name',
  ['v5p', 'v5p:', 'v9:2x2', 'v5e:2x0', 'v5e:8', 'h100:8', 'v5e:2 x 2', 'v5e-8'],
)
def test_other_names_are_refused(name):
  with pytest.raises(ValueError, match='such as v5e:2x4 .* but is') as error:
    Topology.parse(name)
  assert repr(name) in str(error.value) and 'v6e, a100' in str(error.value)


@pytest.mark.parametrize(
  'name, package', [('v4:2x2x1', 'libtpu'), ('a100:1x1x1', 'jax-cuda13-plugin')]
)
def test_a_compiler_that_is_not_installed_is_named(name, package, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=f'{package} is not installed'):
    Topology.parse(name).devices()


@pytest.mark.parametrize('name', chips.CHIPS)
def test_every_gpu_has_a_target(name):
  target = compile_ahead._GPU_TARGETS / f'{name}.txtpb'
  assert target.exists() == (chips.CHIPS[name].platform == 'gpu')
