"""sigma-MoE: a mixture of experts with sigmoid weights, made of its parts."""

from typing import Any

from mowe.layers.mixtures import initial_experts, moe
from mowe.layers.routers import tokens_choose


class SigmaMoe(moe.MoeLayer):
  """MoeLayer with the parts of sigma-MoE.

  Each token chooses the k experts with the largest logits. Their weights are
  the sigmoids of these logits, and are not divided by their sum. Experts are
  ReLU layers, and are initialized as parts of one dense layer. No choice is
  dropped. The paper's entropy regulariser is, like every loss of a router, a
  coefficient of the training step (`RouterLossConfig.entropy`).

  The variants of the paper are made with other routers:
  `TokensChoose(k, sigmoid=False)` takes the softmax of all logits for weights,
  with `renormalize=True` the softmax of the chosen ones, and `SinkhornChoose`
  is S-BASE.

  Source: arXiv 2310.10837; https://github.com/RobertCsordas/moe.

  Attributes:
    activations: names of the activations; ReLU without a gate by default.
    routing: the router; by default a token chooses 4 experts by sigmoids.
    initialization: draws the kernels; SigmaInit for a stack of 12 blocks by
      default.
    expert_dropout_rate: dropout probability of the experts' hidden units; 0 by
      default, because sigma-MoE instead leaves out whole experts in training
      (`exclusion_rate` of the router).

  The other attributes, the call and the errors are those of MoeLayer.
  """

  activations: tuple[str, ...] = ('relu',)
  routing: Any = tokens_choose.TokensChoose(4, sigmoid=True)
  initialization: Any = initial_experts.SigmaInit(12)
  expert_dropout_rate: float | None = 0.0
