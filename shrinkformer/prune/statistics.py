"""Second moments of what each sublayer's consumer weight sees."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.resume import BlockStore
from shrinkformer.prune.stream import BlockStream

Progress = Callable[[Iterable[LayerView]], Iterable[LayerView]]


@dataclass(frozen=True)
class LayerMoments:
    """Moments of the inputs of one block's two consumers."""

    heads: Moments
    neurons: Moments


@dataclass(frozen=True)
class Statistics:
    """What one pass of the calibration examples through the dense model leaves behind.

    Enough for any budget: nothing else of the examples is needed to choose columns or to refit a weight.
    """

    layers: tuple[LayerMoments, ...]
    tokens: int


def collect_statistics(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, progress: Progress = iter, store: BlockStore | None = None
) -> Statistics:
    """Send the calibration examples through a model and keep the second moments of every consumer's input.

    Args:
        model: The dense model, in evaluation mode.
        batches: Model inputs with an ``attention_mask``.
        progress: Wraps the loop over the blocks, for a progress bar.
        store: Keeps finished blocks on disk and gives back those of an interrupted run.
    """
    views = layer_views(model)
    stream = BlockStream(model, views[0].block, batches)
    layers = []
    for view in progress(views):
        moments = store.read(view.index, model.device) if store is not None else None
        if moments is not None:
            stream.run(view.block)
        else:
            moments = _observe(stream, view)
            if store is not None:
                store.write(view.index, moments)
        layers.append(LayerMoments(**moments))
    return Statistics(tuple(layers), stream.tokens)


def _observe(stream: BlockStream, view: LayerView) -> dict[str, Moments]:
    device = view.feed_forward_output.weight.device
    heads, neurons = (Moments.zeros(size, device) for size in (view.attention_output.in_features, view.neurons))
    stream.run(view.block, {view.attention_output: heads.update, view.feed_forward_output: neurons.update})
    return {"heads": heads, "neurons": neurons}
