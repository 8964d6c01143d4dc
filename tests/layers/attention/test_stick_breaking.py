"""Tests stick-breaking attention against its recursion in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from mowe.layers.attention import stick_breaking

_BATCH, _GROUPS, _HEADS, _KV = 2, 3, 2, 4


def _oracle(query, key, value, mask):
  """Computes the weights from the newest key to the oldest, one by one."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  outputs = np.zeros((*query.shape[:4], value.shape[-1]))
  for b, i, g, h in np.ndindex(query.shape[:4]):
    stick = 1.0
    for j in range(key.shape[1] - 1, -1, -1):
      if mask[b, 0, i, j]:
        logit = query[b, i, g, h] @ key[b, j, h] / np.sqrt(query.shape[-1])
        taken = stick * special.expit(logit)
        outputs[b, i, g, h] += taken * value[b, j, h]
        stick -= taken
  return outputs


def _case(num_queries, num_keys, seed=0, size=1.0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  query = size * normal(_BATCH, num_queries, _GROUPS, _HEADS, _KV)
  key = normal(_BATCH, num_keys, _HEADS, _KV)
  value = normal(_BATCH, num_keys, _HEADS, _KV)
  mask = rng.random((_BATCH, 1, num_queries, num_keys)) < 0.7
  behind = np.arange(num_keys) - (num_keys - num_queries)
  mask &= behind[None, :] <= np.arange(num_queries)[:, None]
  mask[0, 0, 0] = False  # One query sees no key.
  return query, key, value, mask


@pytest.mark.slow
@pytest.mark.parametrize('lengths', [(1, 7), (5, 5), (9, 70), (33, 64)])
def test_equals_the_recursion(lengths):
  arguments = _case(*lengths)
  got = jax.jit(stick_breaking.stick_breaking_attention)(*arguments)
  expected = _oracle(*arguments)
  np.testing.assert_allclose(
    got, expected, rtol=0, atol=1e-6 * np.abs(expected).max()
  )
  np.testing.assert_array_equal(got[0, 0], 0)


@pytest.mark.slow
def test_gradients_are_those_of_the_plain_formula():
  query, key, value, mask = _case(6, 37)

  def plain(query, key, value):
    logits = jnp.einsum('bqghd,bkhd->bghqk', query, key) / np.sqrt(_KV)
    fraction = jnp.where(mask[:, None], jax.nn.sigmoid(logits), 0.0)
    left = jnp.flip(jnp.cumprod(jnp.flip(1 - fraction, -1), -1), -1)
    left = jnp.concatenate(
      [left[..., 1:], jnp.ones_like(left[..., :1])], axis=-1
    )
    return jnp.einsum('bghqk,bkhd->bqghd', fraction * left, value)

  cotangent = np.random.default_rng(1).normal(size=query.shape)

  def gradients(function):
    total = lambda *x: jnp.sum(function(*x) * cotangent)
    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)

  ours = gradients(lambda *x: stick_breaking.stick_breaking_attention(*x, mask))
  for got, expected in zip(ours, gradients(plain), strict=True):
    np.testing.assert_allclose(
      got, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.slow
def test_blocks_of_queries_change_nothing(monkeypatch):
  arguments = _case(11, 13)
  cotangent = np.random.default_rng(1).normal(size=arguments[0].shape)

  def both(query, key, value, mask):
    outputs, pull = jax.vjp(
      lambda *x: stick_breaking.stick_breaking_attention(*x, mask),
      query,
      key,
      value,
    )
    return outputs, *pull(jnp.asarray(cotangent, jnp.float32))

  whole = jax.jit(both)(*arguments)
  monkeypatch.setattr(stick_breaking, '_QUERY_BLOCK', 4)
  # Another function, as the one above is traced already.
  in_blocks = jax.jit(lambda *arguments: both(*arguments))(*arguments)
  for got, expected in zip(in_blocks, whole, strict=True):
    np.testing.assert_allclose(
      got, expected, rtol=0, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize('num_queries', [3, 21])
def test_keys_that_no_query_sees_need_not_be_computed(num_queries, monkeypatch):
  monkeypatch.setattr(stick_breaking, '_QUERY_BLOCK', 2)
  *arguments, mask = _case(num_queries, 23)
  num_visible = 23 - num_queries + 1 + np.arange(num_queries)
  attend = stick_breaking.stick_breaking_attention
  # Which keys are seen decides the shapes, so it is not traced.
  got = jax.jit(lambda *x: attend(*x, num_visible))(*arguments, mask)
  expected = jax.jit(attend)(*arguments, mask)
  np.testing.assert_allclose(
    got, expected, rtol=0, atol=1e-6 * np.abs(expected).max()
  )


@pytest.mark.slow
def test_large_logits_stay_finite():
  query, key, value, mask = _case(4, 9, size=1e4)
  outputs, pull = jax.vjp(
    lambda q, k, v: stick_breaking.stick_breaking_attention(q, k, v, mask),
    query,
    key,
    value,
  )
  expected = _oracle(query, key, value, mask)
  np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)
  for gradient in pull(outputs):
    assert np.isfinite(gradient).all()


def test_weights_add_up_to_less_than_one_and_equal_logits_halve():
  weights = stick_breaking.stick_weights(jnp.zeros(5), jnp.ones(5, bool))
  np.testing.assert_allclose(weights, 0.5 ** np.arange(5, 0, -1), rtol=1e-6)


@pytest.mark.slow
def test_padding_is_transparent():
  query, key, value, mask = _case(3, 6)
  holes = np.array([True, False, True, True, False, True])
  mask = np.broadcast_to(holes, mask.shape)
  with_holes = stick_breaking.stick_breaking_attention(query, key, value, mask)
  without = stick_breaking.stick_breaking_attention(
    query, key[:, holes], value[:, holes], mask[..., holes]
  )
  np.testing.assert_allclose(with_holes, without, rtol=0, atol=1e-6)


def test_no_weights_of_all_queries_are_kept():
  num, block = 1024, stick_breaking._QUERY_BLOCK
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  query = shape(1, num, 1, 1, 8)
  key = shape(1, num, 1, 8)
  mask = np.tril(np.ones((num, num), bool))[None, None]

  def loss(query, key, value):
    attend = stick_breaking.stick_breaking_attention
    return attend(query, key, value, mask).sum()

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key)
  temporaries = compiled.compile().memory_analysis().temp_size_in_bytes
  # There are some arrays of one block. The weights of all blocks would be 4 MiB
  # for each array.
  assert temporaries < 8 * 4 * block * num
