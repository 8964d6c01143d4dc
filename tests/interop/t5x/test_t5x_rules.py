"""Tests what T5X is told about our parameters, without importing T5X."""

import pathlib
import re

import pytest

from mowe.interop.t5x import t5x_rules

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_GOLDEN = _ROOT / 'tests' / 'golden'
_FILES = sorted((_ROOT / 'gin_configs' / 't5x').glob('*.gin'))
_MODELS = sorted(_GOLDEN.glob('parameters_*.txt'))
# These names are in t5x.partitioning.standard_logical_axis_rules and, with
# their rules, in t5x.adafactor.standard_logical_factor_rules. Only those that
# our parameters have are listed.
_T5X = {
  'vocab': 'column',
  'embed': 'row',
  'mlp': 'column',
  'heads': 'column',
  'kv': 'column',
  'joined_kv': 'column',
  'relpos_buckets': 'none',
  'layers': 'batch',
}


def _parameters(path):
  """Parameter names and axes of a file with lines `name (sizes) axis axis`."""
  for line in path.read_text().splitlines()[:-1]:
    name, axes = re.fullmatch(r'(\S+) \([^)]*\) (.*)', line).groups()
    yield tuple(name.split('/')), tuple(axes.split())


@pytest.mark.parametrize('path', _MODELS, ids=lambda path: path.stem)
def test_every_axis_of_every_model_has_its_rules(path):
  if any(name[-1] == 'memory_rows' for name, _ in _parameters(path)):
    # T5X refuses models with memories; see test_t5x_models.py.
    return
  factors = t5x_rules.factor_rules()
  on_mesh = {*_T5X, *(axis for axis, _ in t5x_rules.axis_rules())}
  for _, axes in _parameters(path):
    assert set(axes) <= on_mesh & factors.keys()
    rules = [factors[axis] for axis in axes]
    # T5X refuses a parameter that has all of row, column and none.
    assert not {'row', 'column', 'none'} <= set(rules)
    if axes[0] == 'expert' and len(axes) == 3:
      assert sorted(rules) == ['batch', 'column', 'row']


def test_rules_are_those_of_t5x_and_of_experts():
  factors = t5x_rules.factor_rules()
  assert {name: factors[name] for name in _T5X} == _T5X
  assert {type(rule) for rule in factors.values()} == {str}
  added = {axis for axis, _ in t5x_rules.axis_rules()}
  assert added == {'expert', 'expert_mlp', 'unmodeled'}
  assert [factors[name] for name in sorted(added)] == [
    'batch',
    'column',
    'none',
  ]


@pytest.mark.parametrize(
  ('name', 'tables'),
  [('t5_tiny', 0), ('mowe_tiny', 3), ('moe_switch_tiny', 6)],
)
def test_experts_are_found_among_the_parameters(name, tables):
  found = [
    (path, axes)
    for path, axes in _parameters(_GOLDEN / f'parameters_{name}.txt')
    if t5x_rules.is_expert(path)
  ]
  assert len(found) == tables
  assert all(axes[0] == 'expert' for _, axes in found)


@pytest.mark.parametrize('path', _FILES, ids=lambda path: path.stem)
def test_a_gin_file_includes_files_that_are_there(path):
  text = path.read_text()
  for included in re.findall(r"^include '(.*)'$", text, re.MULTILINE):
    assert (_ROOT / included).is_file()
  # A gin file can name only modules that it imports itself.
  imported = set(re.findall(r'^from \S+ import (\w+)$', text, re.MULTILINE))
  bound = re.findall(r'^(?:\w+ = @)?(\w+)\.\w+', text, re.MULTILINE)
  assert set(bound) <= imported


def test_the_plug_in_says_what_it_misses(monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, 'seqio', None)
  monkeypatch.delitem(sys.modules, 'mowe.interop.t5x.t5x_models', raising=False)
  with pytest.raises(ImportError, match=r'needs T5X .* docs/t5x.md lists'):
    import mowe.interop.t5x.t5x_models  # noqa: F401
