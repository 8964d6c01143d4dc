"""The train state a run begins with: resumed, from other weights, or fresh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax

from mowe.commands import model_folder
from mowe.models import parameters, t5
from mowe.training import checkpoints as checkpoints_lib
from mowe.training import optimizers, partitioning, row_optimizers, train_state


@dataclasses.dataclass(frozen=True)
class Setup:
  """How the train state is made, and where on the devices it lies.

  Attributes:
    optimizer: the optax transformation of ordinary parameters.
    create: seed key to a fresh TrainState; to be jitted.
    abstract: shapes and shardings of the state, tables always included, as it
      is on disk.
    freeze_experts: the tables are held apart from the trained state.
    seed: of fresh parameters.
  """

  optimizer: Any
  create: Callable[[jax.Array], train_state.TrainState]
  abstract: train_state.TrainState
  freeze_experts: bool
  seed: int

  @classmethod
  def make(
    cls,
    model: t5.T5,
    optimizer: optimizers.Optimizer,
    row_optimizer: row_optimizers.RowOptimizer | None,
    mesh: jax.sharding.Mesh,
    seed: int,
  ) -> 'Setup':
    """Builds the optimizer for the model's parameters; allocates nothing."""
    key = jax.random.key(seed)
    variables = jax.eval_shape(
      lambda key: parameters.initial_variables(model, key), key
    )
    axes = partitioning.parameter_axes(variables['params_axes'])
    ordinary, _ = parameters.split_tables(variables['params'])
    paths = flax.traverse_util.flatten_dict(ordinary)
    built = optimizer.build(
      flax.traverse_util.unflatten_dict({path: axes[path] for path in paths})
    )

    def create(key):
      return train_state.create(
        model, key, optimizer=built, row_optimizer=row_optimizer
      )

    abstract = jax.eval_shape(create, key)
    shardings = partitioning.state_shardings(abstract, axes, mesh)
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      abstract,
      shardings,
    )
    return cls(built, create, abstract, row_optimizer is None, seed)

  def start(
    self,
    checkpoints: checkpoints_lib.Checkpoints,
    described: dict[str, Any],
    initial_path: str | None,
  ) -> tuple[train_state.TrainState, parameters.Tables]:
    """The state to train, and the tables that are frozen ({} if none are).

    Args:
      checkpoints: of this run; its latest is resumed if there is one.
      described: what must be as it was when the run began.
      initial_path: whose parameters a new run takes; None: fresh ones.
    """
    if checkpoints.latest_step() is not None:
      checkpoints.check_metadata(described)
      state = checkpoints.restore(self.abstract)
      print(f'Resumed {checkpoints.folder} at step {int(state.step)}.')
    elif initial_path is not None:
      state = self._fresh(params={}, tables={})
      state = state.replace(**self._parameters_of(initial_path))
    else:
      state = self._fresh()
    if not self.freeze_experts:
      return state, {}
    return state.replace(tables={}), state.tables

  def jit(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
    """The jitted step: the state is donated and stays where it lies."""
    trained = self.abstract
    if self.freeze_experts:
      trained = trained.replace(tables={})
    return jax.jit(
      train_step,
      donate_argnums=0,
      out_shardings=(_shardings(trained), None),
    )

  def _fresh(self, **left_out: Any) -> train_state.TrainState:
    # What is left out is not even computed.
    return jax.jit(
      lambda key: self.create(key).replace(**left_out),
      out_shardings=_shardings(self.abstract.replace(**left_out)),
    )(jax.random.key(self.seed))

  def _parameters_of(self, path: str) -> dict[str, Any]:
    folder, step = model_folder.split_checkpoint_path(path)
    wanted = {'params': self.abstract.params, 'tables': self.abstract.tables}
    with checkpoints_lib.Checkpoints(folder) as source:
      parts = source.restore_parameters(wanted, step)
      step = source.latest_step() if step is None else step
    print(f'Started from {folder}, step {step}.')
    return parts


def _shardings(abstract: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)
