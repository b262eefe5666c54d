"""What a run measures of its model's spectra, as `conf/spectra` has it, and at which steps."""

from collections.abc import Mapping
from functools import cache

from torch import Tensor, nn

from lrtrain.config.schema import Config
from lrtrain.core.metrics import Metric
from lrtrain.data.prepare import Data
from lrtrain.distributed.world import World
from lrtrain.engine.base import Engine
from lrtrain.errors import ConfigError
from lrtrain.measure.evaluate import evenly_spaced
from lrtrain.measure.gradients import GradientSpectra
from lrtrain.measure.hidden import hidden_metrics, top_states, whole_states
from lrtrain.measure.movement import Movement
from lrtrain.measure.weights import (
    LinearLayer,
    matching,
    part_metrics,
    single,
    spectra_metrics,
    tail_metrics,
    too_large,
    weight_estimates,
    weight_spectra,
)
from lrtrain.model.build import make_model
from lrtrain.model.experts import measured
from lrtrain.model.init import initial_layer


def check_patterns(config: Config, model: nn.Module) -> None:
    """Check that each pattern of `spectra` finds a layer, of a model that may be on meta.

    Raises:
        ConfigError: if one finds none, although layers are measured.
    """
    layers = single(measured(model, config.param["pattern"]))
    for key in ("parts", "tails", "gradients", "updates"):
        pattern = getattr(config.spectra, key)
        if config.spectra.every and layers and pattern is not None and not matching(layers, pattern):
            raise ConfigError(
                f"spectra.{key}={pattern} matches none of the measured layers, such as {next(iter(layers))}"
            )


class Monitor:
    """Measures the model that an engine trains; what it keeps from one measurement to the next is in no checkpoint."""

    def __init__(self, config: Config, engine: Engine, data: Data, world: World):
        self.config, self.engine, self.data, self.world = config, engine, data, world
        self.chosen = config.spectra
        self.directions = top_states(engine.model, world) if self.chosen.hidden_by == "top" else []
        self.gradients = GradientSpectra()
        unchanged = cache(lambda: make_model(config))  # on meta, and only if updates are measured
        drawn = None if config.init_from else lambda name: initial_layer(unchanged(), name, config.train.seed)
        self.movement = Movement(drawn)

    @property
    def matrices(self) -> Mapping[str, LinearLayer]:
        """The measured layers, with the parameters that the optimizer steps."""
        return measured(self.engine.shards, self.config.param["pattern"])

    def measure(self) -> tuple[list[Metric], dict[str, Tensor]]:
        """Metrics of weights, hidden states and updates; singular values by the layer's name, of experts their
        means. A collective."""
        layers, chosen = self.matrices, self.chosen
        large = too_large(layers, chosen.exact_up_to)
        spectra = weight_spectra({name: layer for name, layer in layers.items() if name not in large})
        shares, parts = part_metrics(matching(single(layers), chosen.parts))
        metrics = spectra_metrics(spectra, weight_estimates(large)) + shares
        metrics += tail_metrics(matching(single(layers), chosen.tails), spectra)
        metrics += self._hidden()
        metrics += self.movement.measure(matching(single(layers), chosen.updates))
        means = {name: sigma.mean(0) if sigma.ndim == 2 else sigma for name, sigma in spectra.items()}
        return metrics, means | parts

    def _hidden(self) -> list[Metric]:
        rows = evenly_spaced(len(self.data.validation), self.chosen.hidden)
        if not rows:
            return []
        states, model = self.data.validation.rows(rows), self.engine.model
        kept = self.directions if self.chosen.hidden_by == "top" else whole_states(model, self.world)
        return hidden_metrics(self.engine.loss, states, self.config.train.micro_batch_size, self.world, kept)

    def measure_gradients(self) -> list[Metric]:
        """Metrics of the current gradients; a collective."""
        layers = matching(single(self.matrices), self.chosen.gradients)
        return self.gradients.measure(layers) if layers else []
