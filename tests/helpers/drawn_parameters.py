"""Draws the parameters of a layer; compiling its own `init` takes longer."""

import jax
import jax.numpy as jnp
import numpy as np


def variables(layer, *inputs, seed=0):
  """The variables of `layer.init`, with normal numbers as parameters.

  A kernel has the deviation 1 / sqrt(rows). Biases are not zero, because a test
  could not see a bias that is.

  Args:
    layer: a Linen module.
    *inputs: what the layer is called with.
    seed: seed of the numbers.
  """
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)

  def draw(leaf):
    rows = leaf.shape[-2] if leaf.ndim > 1 else 10
    return jnp.asarray(rng.normal(size=leaf.shape) / rows**0.5, leaf.dtype)

  return {**shapes, 'params': jax.tree.map(draw, shapes['params'])}
