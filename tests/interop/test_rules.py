"""Tests a small table of rules in both directions."""

import re

import numpy as np
import pytest

from mowe.interop import rules

Rule = rules.Rule

_RULES = (
  Rule('emb', 'embedding'),
  Rule('emb_again', 'embedding', is_copy=True),
  Rule('block{layer}.in', 'layers_{layer}/in/kernel', is_transposed=True),
  Rule('block{layer}.out', 'layers_{layer}/out/kernel', is_transposed=True),
  Rule('block{layer}.expert_{expert}', 'layers_{layer}/expert', True),
  Rule('position_ids', None),
)

_KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)
# There are more than ten experts, so that the order of numbers is not that of
# names.
_EXPERTS = np.arange(11 * 4 * 5, dtype=np.float32).reshape(11, 4, 5)

_THEIRS = {
  'emb': np.asarray([3, 4], np.float32),
  'block7.out': _KERNEL.T,
  **{f'block7.expert_{e}': _EXPERTS[e].T for e in range(11)},
}
_OURS = {
  ('embedding',): np.asarray([3, 4], np.float32),
  ('layers_7', 'out', 'kernel'): _KERNEL,
  ('layers_7', 'expert'): _EXPERTS,
}


def _assert_same(actual, expected):
  assert set(actual) == set(expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value)
    assert actual[name].dtype == np.float32


def test_a_table_in_both_directions():
  _assert_same(rules.to_ours(_THEIRS, _RULES), _OURS)
  _assert_same(rules.to_theirs(_OURS, _RULES), _THEIRS)


def test_names_that_no_rule_is_for_are_listed():
  names = ['emb', 'block7.bias', 'block7.out.', 'block07.out', 'blockx.out']
  message = 'is for block7.bias, block7.out., block07.out, blockx.out. Take'
  with pytest.raises(ValueError, match=re.escape(message)):
    rules.places(names, _RULES)
  with pytest.raises(
    ValueError, match=r'layers_1/bias matches none. The other'
  ):
    rules.to_theirs({('layers_1', 'bias'): np.zeros(2)}, _RULES)


def test_dots_of_a_rule_are_dots():
  with pytest.raises(ValueError, match='no rule is for block7xout'):
    rules.places(['block7xout'], _RULES)


def test_a_name_with_two_rules_is_refused():
  two = (*_RULES, Rule('emb', 'other'))
  message = "emb matches ['emb', 'emb']. Remove"
  with pytest.raises(ValueError, match=re.escape(message)):
    rules.places(['emb'], two)


def test_copies_are_read_once():
  emb = np.asarray([3, 4], np.float32)
  ids = np.asarray([0, 1])
  for given in (
    {'emb': emb, 'emb_again': emb.copy(), 'position_ids': ids},
    {'emb_again': emb},
  ):
    assert set(rules.without_copies(given, _RULES)) == {'emb'}
  with pytest.raises(
    ValueError, match='emb_again must equal emb, as the model'
  ):
    rules.without_copies({'emb': emb, 'emb_again': emb + 1}, _RULES)


def test_what_is_left_over_is_listed():
  given = {'a': np.zeros((2, 3)), 'b': np.zeros(4), 'd': np.zeros(5)}
  wanted = {'a': np.zeros((3, 2)), 'b': np.zeros(4), 'c': np.zeros(6)}
  message = (
    'missing: c; too many: d; of another shape: a [2, 3] instead of [3, 2]. '
    'Take'
  )
  with pytest.raises(ValueError, match=re.escape(message)):
    rules.check_names(given, wanted)
  rules.check_names(wanted, wanted)


def test_a_long_list_is_cut():
  message = 'x0, x1, x10, x11, x2, x3, x4, x5, x6, x7 and 2 more. Take'
  with pytest.raises(ValueError, match=re.escape(message)):
    rules.check_names({f'x{i}': np.zeros(1) for i in range(12)}, {})
