"""Makes the state a run begins with: resumed, from other weights, or fresh."""

import contextlib
import dataclasses
import functools
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import optax
from flax import linen as nn

from mowe.model_folders import model_folder
from mowe.models import initialization, model_config, parameters, threefry
from mowe.models.surgery import upcycling
from mowe.stores import expert_sources, expert_stores, no_experts, store_groups
from mowe.stores.row_files import expert_records, row_file, row_index
from mowe.training import (
  checkpointing,
  partitioning,
  table_layouts,
  train_state,
)
from mowe.training.optimization import optimizers, row_optimizers

# Name of a group of tables -> the source of its rows.
_Sources = dict[str, expert_sources.ExpertSource]


@dataclasses.dataclass(frozen=True)
class Setup:
  """How the train state is made, and where it lies on the devices.

  Attributes:
    model: the Linen module.
    optimizer: the optax transformation of ordinary parameters.
    row_optimizer: the optimizer of the expert tables. None: they are frozen,
      and held apart from the trained state.
    abstract: shapes and shardings of the state. It always has the whole tables,
      even if a store keeps them elsewhere.
    seed: the seed of fresh parameters.
    make_memory: returns the memory before the first batch; None: the model has
      no memory.
  """

  model: nn.Module
  optimizer: optax.GradientTransformation
  row_optimizer: row_optimizers.RowOptimizer | None
  abstract: train_state.TrainState
  seed: int
  make_memory: Callable[[], Any] | None = None

  @classmethod
  def make(
    cls,
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    row_optimizer: row_optimizers.RowOptimizer | None,
    mesh: jax.sharding.Mesh,
    seed: int,
    batch_size: int,
  ) -> 'Setup':
    """Builds the optimizer for the model's parameters; allocates nothing."""
    make_memory = None
    if model.config.memory_length:
      make_memory = functools.partial(model.config.initial_memory, batch_size)
    variables = initialization.abstract_variables(model)
    axes = partitioning.parameter_axes(variables['params_axes'])
    ordinary, tables = parameters.split_tables(variables['params'])
    paths = flax.traverse_util.flatten_dict(ordinary)
    built = optimizer.build(
      flax.traverse_util.unflatten_dict({path: axes[path] for path in paths})
    )
    abstract = jax.eval_shape(
      functools.partial(
        train_state.begin,
        optimizer=built,
        row_optimizer=row_optimizer,
        make_memory=make_memory,
      ),
      ordinary,
      tables,
    )
    abstract = _placed(
      abstract, partitioning.state_shardings(abstract, axes, mesh)
    )
    return cls(model, built, row_optimizer, abstract, seed, make_memory)

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The device mesh on which the state lies."""
    return self.abstract.step.sharding.mesh

  def start(
    self,
    checkpoints: checkpointing.Checkpoints,
    described: dict[str, Any],
    initial_path: str | None,
    store: expert_stores.Store = expert_stores.DeviceStore(),
    at_once: Mapping[str, int] = types.MappingProxyType({}),
  ) -> tuple[train_state.TrainState, expert_stores.Experts]:
    """Makes the state to train, and opens its tables.

    Args:
      checkpoints: the checkpoints of this run. The latest is resumed if there
        is one.
      described: what must be as it was when the run began.
      initial_path: a model folder or checkpoint whose parameters a new run
        takes; None: it draws fresh ones. The feed-forwards of a dense model
        become experts, as `upcycling` describes.
      store: where tables lie.
      at_once: name of a group of tables -> number of rows that an ordinary
        batch reads.

    Returns:
      The state; and the tables, which the caller closes in the end.
    """
    if not self.abstract.tables:
      state, _, _ = self._start(checkpoints, described, initial_path)
      return state, no_experts.NoExperts()
    groups = parameters.in_groups(self.abstract.tables)
    with contextlib.ExitStack() as if_it_fails:
      # The files are locked before checkpoints are looked for. Otherwise a run
      # that is about to end in this folder might still write one.
      files = {}
      for group in groups:
        files[group] = row_file.LockedFile(
          checkpoints.folder, jax.process_index(), group
        )
        if_it_fails.callback(files[group].close)
      # The files of rows have what the indexes of all checkpoints name.
      checkpoints.set_aside_damaged('*.npz')
      state, sources, is_resumed = self._start(
        checkpoints, described, initial_path
      )
      with contextlib.ExitStack() as reading:
        opened = {}
        for group in groups:
          reading.callback(sources[group].close)
          opened[group] = store.open(
            self._row_file(files[group], group, sources, is_resumed),
            self._tables(group),
            is_trained=self.row_optimizer is not None,
            is_resumed=is_resumed,
            experts_at_once=at_once.get(group, 0),
          )
        stores = store_groups.StoreGroups(opened)
        tables, table_state = stores.start(sources)
      # From here on the stores hold the files, and close them in the end.
      if_it_fails.pop_all()
    return state.replace(tables=tables, table_state=table_state), stores

  def _start(self, checkpoints, described, initial_path):
    """The state without tables, their sources, and whether the run resumes."""
    if checkpoints.latest_step() is not None:
      checkpoints.check_metadata(described)
      state = checkpoints.restore(self._without_tables())
      print(f'Resumed {checkpoints.folder} at step {int(state.step)}.')
      return state, self._saved_tables(checkpoints, None), True
    if initial_path is not None:
      params, sources = self._parameters_of(initial_path)
    else:
      params, sources = self._fresh_parameters()
    return self._begin(params), sources, False

  def jit(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Jits a train step. It donates the state and keeps its shardings."""
    trained = self.abstract
    if self.row_optimizer is None:
      trained = trained.replace(tables={})
    return jax.jit(
      partitioning.on_mesh(train_step, self.mesh),
      donate_argnums=0,
      out_shardings=(table_layouts.formats(trained), None),
    )

  def _tables(self, group: str) -> expert_sources.Arrays:
    """Abstract tables and row state of a group."""
    of_group = lambda tree: parameters.in_groups(tree).get(group, {})
    return of_group(self.abstract.tables), of_group(self.abstract.table_state)

  def _without_tables(self) -> train_state.TrainState:
    return self.abstract.replace(tables={}, table_state={})

  def _begin(self, params: Any) -> train_state.TrainState:
    """The state at step 0 of training these ordinary parameters."""
    return train_state.begin(
      params,
      {},
      optimizer=self.optimizer,
      row_optimizer=None,
      shardings=_shardings(self._without_tables()),
      make_memory=self.make_memory,
    )

  def _fresh_parameters(self) -> tuple[Any, _Sources]:
    key = threefry.key(self.seed)
    params = initialization.initial_parameters(
      self.model, key, _shardings(self.abstract.params)
    )
    groups = parameters.in_groups(self.abstract.tables)
    return params, {
      group: expert_sources.FreshExperts(self.model, key, tables)
      for group, tables in groups.items()
    }

  def _parameters_of(self, path: str) -> tuple[Any, _Sources]:
    """Ordinary parameters of another model, and the sources of its tables."""
    folder, step = model_folder.split_checkpoint_path(path)
    wanted = self.abstract.params
    is_dense = self._is_dense_twin(folder)
    if is_dense:
      wanted = upcycling.dense_shapes(wanted)
    with checkpointing.Checkpoints(folder) as saved:
      params = saved.restore_parameters({'params': wanted}, step)['params']
      step = saved.latest_step() if step is None else step
      sources = self._saved_tables(saved, step, kernels_only=True)
    print(f'Started from {folder}, step {step}.')
    if is_dense:
      params = upcycling.upcycle(
        self.model, params, self.abstract.params, threefry.key(self.seed)
      )
      print('It is dense: every expert starts as a copy of its MLP.')
    return params, sources

  def _saved_tables(self, checkpoints, step, kernels_only=False) -> _Sources:
    sources = {}
    for group in parameters.in_groups(self.abstract.tables):
      sources[group] = expert_sources.SavedExperts(
        checkpoints.finished(step),
        group,
        model=self.model,
        kernels_only=kernels_only,
      )
      sources[group].check(self._tables(group))
    return sources

  def _row_file(self, file, group, sources, is_resumed) -> row_file.RowFile:
    """The file of a group's rows, as it is when this run begins."""
    tables = self._tables(group)
    if is_resumed:
      index = sources[group].index
    else:
      index = row_index.RowIndex(
        expert_records.record_dtype(*tables),
        jax.tree.leaves(tables)[0].shape[0],
        group,
        sources[group].fresh_key,
      )
    return row_file.RowFile(
      file,
      index,
      sources[group].fresh,
      jax.process_index(),
      jax.process_count(),
    )

  def _is_dense_twin(self, folder: pathlib.Path) -> bool:
    """Whether this model has routers and the model in the folder is dense."""
    if not model_config.routes_tokens(self.model.config):
      return False
    source, _ = model_folder.load_config(folder)
    if source.sparse_feed_forward is not None:
      return False
    upcycling.check(self.model.config)
    return True


def _placed(
  abstract: train_state.TrainState, shardings: train_state.TrainState
) -> train_state.TrainState:
  """The abstract state with its shardings, and tables in their order."""

  def with_sharding(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(with_sharding, abstract, shardings).replace(
    tables=jax.tree.map(
      table_layouts.laid_out, abstract.tables, shardings.tables
    ),
    table_state=jax.tree.map(
      table_layouts.laid_out, abstract.table_state, shardings.table_state
    ),
  )


def _shardings(abstract: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)
