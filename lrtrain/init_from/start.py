"""Starting a run from source weights: the ranks within a budget, and the values of each layer.

One rank computes the values of a layer and broadcasts them; each rank keeps its shards.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrtrain.checkpoint.source_weights import check_origin, open_origin
from lrtrain.config.schema import Config, as_dict
from lrtrain.config.stored import stored_targets
from lrtrain.core.seeds import generator_for
from lrtrain.data.prepare import prepare_data
from lrtrain.distributed.per_layer import compute_across_ranks
from lrtrain.distributed.sharding import keep_shard, take_over
from lrtrain.distributed.world import World
from lrtrain.engine.forward import dense_model
from lrtrain.errors import ConfigError
from lrtrain.init_from.allocation import Shape, allocate, factor_parameters, uniform_ranks
from lrtrain.init_from.calibration import Moment, in_groups, input_groups, second_moments
from lrtrain.layers.base import FactorizedLinear
from lrtrain.linalg.initial import one_thread
from lrtrain.linalg.nearest import Fit
from lrtrain.model.build import build_model, make_model
from lrtrain.model.rank import RankPlan
from lrtrain.model.structure import factorized_layers, first_names

Values = dict[str, Tensor]
Compute = Callable[[str, Fit, Moment | None], Values]


def named_code(config: Config) -> set[str]:
    """Code that the command trusts, also for source weights: its `_target_`s, and a model.path with code."""
    own = {str(target) for _, target in stored_targets(as_dict(config))}
    return own | ({str(config.model.path)} if config.model.trust_remote_code else set())


class Start:
    """What `init_from` gives a model; a collective, as is `fill`.

    Args:
        model: the one of the configuration, on meta.

    Attributes:
        rank_plan: of the layers, where a budget decides on it; else the configuration's.

    Raises:
        ConfigError: if the weights cannot be had or do not fit the model, or the layers stand for no matrices.
    """

    def __init__(self, config: Config, model: PreTrainedModel, world: World):
        assert config.init_from is not None
        self.config, self.settings = config, config.compress
        self.world = world
        dense = build_model(model.config)
        self.origin = open_origin(config.init_from, dense, named_code(config))
        check_origin(config.init_from, self.origin, dense)
        layers = factorized_layers(model)
        check_layers(layers, self.settings.affine)
        if experts := [name for name, layer in layers.items() if layer.batch > 1]:
            self._check_experts(experts[0])
        self.layers = layers
        self.groups: dict[str, list[str]] = in_groups([*layers])
        self.moments: dict[str, Moment] = {}
        if layers and self.settings.by == "outputs":
            self._calibrate(dense)
        self.rank_plan = RankPlan(config.param["rank"])
        if layers and self.settings.budget is not None:
            self.rank_plan = replace(self.rank_plan, exact=self._allocate(layers, self.settings.budget))

    def _check_experts(self, name: str) -> None:
        """Refuse what is not there for experts, of which this is one weight."""
        if self.settings.by == "outputs":
            raise ConfigError(
                f"compress.by=outputs has no inputs of {name}, which are experts; use compress.by=weights"
            )
        if self.settings.budget is not None:
            raise ConfigError(
                f"compress.budget={self.settings.budget} allocates ranks to single matrices, and {name} are experts; "
                "set param.rank, or param.pattern so that it leaves the experts out"
            )

    def _calibrate(self, dense: PreTrainedModel) -> None:
        """Compute the layers' input moments on the first sequences of the training text."""
        world = self.world
        text = prepare_data(self.config.data, self.config.train.seed).train  # the run's may be a stream
        rows = text.batch(0, self.settings.sequences, world.dist_rank, world.size)[:, :-1]
        model = dense_model(dense, self.origin.tensor, self.config.train.seed, world)
        watched = {name: model.get_submodule(name) for name in self.groups}
        self.groups = input_groups(model, watched, rows[:1].to(world.device))
        leaders = {name: watched[name] for name in self.groups}
        self.moments = second_moments(model, leaders, rows, self.config.train.micro_batch_size, world)

    def _allocate(self, layers: Mapping[str, FactorizedLinear], budget: float) -> dict[str, int]:
        """The ranks with which the layers hold this share of their dense parameters, what they have beside the factors
        (values, columns) included."""
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        beside = sum(map(beside_factors, layers.values())) / sum(map(math.prod, shapes.values()))
        try:
            if self.settings.ranks == "uniform":
                return fitting(uniform_ranks(shapes, budget - beside), shapes, budget - beside)
            spectra = {name: values["sigma"].cpu() for name, values in self._across_ranks(self._spectrum)}
            return allocate(spectra, shapes, budget - beside, self.settings.ranks)
        except ValueError as error:
            raise ConfigError(
                f"compress.budget={budget} is a share of the dense parameters, of which param="
                f"{self.config.param['name']} takes {beside:.3g} beside its factors: {error}"
            ) from error

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Fill the (maybe sharded) tensors of the model's state in place."""
        model = make_model(self.config, self.rank_plan)
        layers, firsts = factorized_layers(model), first_names(model)
        inside = tuple(f"{name}." for name in layers)
        for name, tensor in state.items():
            if not name.startswith(inside):
                keep_shard(tensor, self.origin.tensor(firsts[name]))
        for name, values in self._across_ranks(lambda name, *how: self._values(name, layers[name], *how)):
            for key, value in values.items():
                keep_shard(state[f"{name}.{key}"], value)

    def _values(self, name: str, layer: FactorizedLinear, fit: Fit, moment: Moment | None) -> Values:
        """All that the state has of a layer, which is given on meta."""
        seed = self.config.train.seed
        weight = self._weight(name)
        layer = copy.deepcopy(layer).to_empty(device=weight.device)
        take_over(layer, layer.init_buffers(generator_for(seed, f"{name}/buffers")))
        values = layer.start_from(weight, fit, generator_for(seed, name))
        if (key := bias_of(layer)) is not None:
            values[key] = self.origin.tensor(f"{name}.bias").to(weight)
            if moment is not None and self.settings.affine:
                take_over(layer, values)
                values[key] += (weight - layer.dense_weight()) @ moment.mean  # keeps the mean of the outputs
        return values

    def _spectrum(self, name: str, fit: Fit, moment: Moment | None) -> Values:
        return {"sigma": fit.spectrum(self._weight(name))}

    def _weight(self, name: str) -> Tensor:
        """W (out, in); of experts (experts, out, in)."""
        layer = self.layers[name]
        weight = self.origin.tensor(name if layer.batch > 1 else f"{name}.weight")
        return (weight.mT if layer.transposed else weight).to(self.world.device, torch.float64)

    @torch.no_grad()
    def _across_ranks(self, compute: Compute) -> Iterator[tuple[str, Values]]:
        """(name, compute(name, fit, moment)) for all layers on every process; those of a group by the same one, which
        holds their moment."""

        def of_group(leader: str) -> Values:
            moment = self.moments.get(leader)
            with one_thread():  # so that values do not depend on the number of processes
                fit = Fit() if moment is None else Fit(moment.centred() if self.settings.affine else moment.products)
                found = {name: compute(name, fit, moment) for name in self.groups[leader]}
            return {f"{name}/{key}": value for name, values in found.items() for key, value in values.items()}

        for leader, values in compute_across_ranks([*self.groups], of_group):
            for name in self.groups[leader]:
                yield name, {k.removeprefix(f"{name}/"): v for k, v in values.items() if k.startswith(f"{name}/")}


def check_layers(layers: Mapping[str, FactorizedLinear], affine: bool) -> None:
    """Raises ConfigError if a layer (on meta) cannot start from a weight, or has no bias for an affine fit."""
    for name, layer in layers.items():
        try:
            if type(layer).start_from is FactorizedLinear.start_from:
                raise NotImplementedError(f"{type(layer).__name__} has no start_from, which would take over a weight")
            layer.check_start()
        except NotImplementedError as error:
            raise ConfigError(f"init_from cannot start {name}: {error}") from error
        if affine and bias_of(layer) is None:
            raise ConfigError(f"compress.affine=true fits biases, and {name} has none; set it to false")


def bias_of(layer: FactorizedLinear) -> str | None:
    """The name of the layer's bias, if it has one."""
    return next((name for name, _ in layer.named_parameters() if layer.roles[name] == "bias"), None)


def beside_factors(layer: FactorizedLinear) -> int:
    """The number of values in a layer besides its factors' r(out + in) and the bias, for any rank."""
    own = sum(p.numel() for name, p in layer.named_parameters() if name != bias_of(layer))
    return own - layer.rank * (layer.out_features + layer.in_features)


def fitting(ranks: dict[str, int], shapes: Mapping[str, Shape], budget: float) -> dict[str, int]:
    """The ranks; raises ValueError if they exceed the budget."""
    if factor_parameters(ranks, shapes) > budget * sum(map(math.prod, shapes.values())):
        raise ValueError(f"a budget of {budget:g} is too small: rank 1 in every matrix needs more")
    return ranks
