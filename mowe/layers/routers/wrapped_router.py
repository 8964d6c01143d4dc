"""Base of routers that wrap another router and forward its settings."""

from mowe.layers.routers import router_base


class WrappedRouter:
  """A router around a router whose tokens choose by learned logits.

  The settings that a layer reads are those of the router inside.

  Attributes:
    router: the router inside.
  """

  router: router_base.LearnedRouter

  is_learned = True
  is_balanced = False
  routes_padding = False
  each_token_chooses = True

  @property
  def looks_ahead(self) -> bool:
    """See `router_base.Router`."""
    return self.router.looks_ahead

  @property
  def sigmoid(self) -> bool:
    """Whether weights are sigmoids."""
    return self.router.sigmoid

  @property
  def use_bias(self) -> bool:
    """Whether logits have a learned bias."""
    return self.router.use_bias

  @property
  def jitter(self) -> float:
    """Noise on the inputs of the logits in training."""
    return self.router.jitter

  @property
  def bias_rate(self) -> float:
    """Step of the selection bias."""
    return self.router.bias_rate

  @property
  def exclusion_rate(self) -> float:
    """Share of the modules that a token may not have in training."""
    return self.router.exclusion_rate
