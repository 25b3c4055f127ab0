"""Second moments of what each sublayer's consumer weight sees."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.prune.columns import ColumnSurvey
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import BlockStore
from shrinkformer.prune.stream import BlockStream

Progress = Callable[[Iterable[LayerView]], Iterable[LayerView]]
Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class LayerMoments:
    """Moments of the inputs of one block's two consumers, and of its queries, keys and values if asked for."""

    heads: Moments
    neurons: Moments
    inputs: Moments | None = None


@dataclass
class Statistics:
    """What one pass of the calibration examples through the dense model leaves behind.

    Enough for any budget: nothing else of the examples is needed to choose columns or to refit a weight.

    Attributes:
        store: Where the moments are that are not in memory.
        layers: Moments in memory, by block.
    """

    store: BlockStore | None = None
    layers: dict[int, LayerMoments] = field(default_factory=dict)

    def of(self, view: LayerView) -> LayerMoments:
        """The moments of a block, on its device."""
        if view.index in self.layers:
            return self.layers[view.index]
        moments = self.store.read(view.index, view.feed_forward_output.weight.device) if self.store else None
        assert moments is not None, f"no statistics of layer {view.index}"
        return LayerMoments(**moments)


def stream_statistics(
    model: PreTrainedModel, batches: Batches, resources: Resources, *, progress: Progress = iter, inputs: bool = False
) -> Iterator[tuple[LayerView, LayerMoments]]:
    """Send the calibration examples through a model and give the second moments of every consumer's input.

    While a block is handed out, its weights are on the device. With several workers each sends its share of the
    examples, and all of them get the sums.

    Args:
        model: The dense model, in evaluation mode.
        batches: Model inputs with an ``attention_mask``; those of all workers.
        resources: Where weights come from and where data goes.
        progress: Wraps the loop over the blocks, for a progress bar.
        inputs: Take the moments of what queries, keys and values are computed from, too.
    """
    workers, store = resources.workers, resources.store
    stream, survey = BlockStream(model, workers.share(batches), resources.offload), ColumnSurvey()
    for view in progress(layer_views(model)):
        with resources.weights.resident(view.index):
            finished = workers.broadcast(store is not None and store.holds(view.index))
            if finished and store is not None:
                moments = store.read(view.index, view.feed_forward_output.weight.device)
                stream.run(view.block)
            else:
                moments = _observe(stream, view, inputs)
                if store is not None and workers.is_main:
                    store.write(view.index, moments)
                workers.barrier()
            assert moments is not None
            survey.add(f"{view.architecture.attention.output} of layer {view.index}", moments["heads"])
            survey.add(f"{view.architecture.feed_forward.output} of layer {view.index}", moments["neurons"])
            yield view, LayerMoments(**moments)
    survey.warn()


def _observe(stream: BlockStream, view: LayerView, inputs: bool) -> dict[str, Moments]:
    linears = {"heads": view.attention_output, "neurons": view.feed_forward_output}
    if inputs:
        linears["inputs"] = view.linear(view.architecture.attention.query)
    moments = {name: Moments.zeros(linear.in_features, linear.weight.device) for name, linear in linears.items()}
    stream.run(view.block, {linear.module: moments[name].update for name, linear in linears.items()})
    for one in moments.values():
        one.all_reduce()
    return moments
