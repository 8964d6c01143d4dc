"""Most tests compile quickly, which must change nothing but machine code."""

import jax
import jax.numpy as jnp


def test_quick_programs_have_the_same_hlo_and_buffers():
  def loss(kernel, tokens):
    hidden = jax.nn.relu(tokens @ kernel)
    return jnp.sum(jax.nn.softmax(hidden @ kernel.T) ** 2)

  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  lowered = jax.jit(jax.grad(loss)).lower(shape(5, 7), shape(3, 5))
  programs = []
  for is_quick in (True, False):
    jax.config.update('jax_disable_most_optimizations', is_quick)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    programs.append((compiled.as_text(), memory.temp_size_in_bytes))
  assert programs[0] == programs[1]
