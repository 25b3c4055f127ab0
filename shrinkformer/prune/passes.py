"""One block, run again and again over the examples while its layers are quantized one after the other."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shrinkformer.architectures import LayerView, Projection
from shrinkformer.prune.hidden import HiddenStates, Offload, hidden_states
from shrinkformer.prune.sites import Site
from shrinkformer.prune.stream import BlockStream, token_rows


class _Reached(Exception):  # noqa: N818
    """Ends a block's forward pass when all that was wanted is recorded."""


@dataclass
class Seen:
    """What went into and came out of some modules in one forward pass, by path."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


@contextmanager
def watched(modules: Mapping[str, nn.Module], last: str = "") -> Iterator[Seen]:
    """Record inputs and outputs of modules; the forward pass inside ends before the module ``last`` computes."""
    seen = Seen()

    def before(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args:  # attention modules of some families get keywords only
                seen.inputs[path] = args[0]
            if path == last:
                raise _Reached

        return hook

    def after(path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            seen.outputs[path] = output

        return hook

    handles = [module.register_forward_pre_hook(before(path)) for path, module in modules.items()]
    handles += [module.register_forward_hook(after(path)) for path, module in modules.items()]
    try:
        yield seen
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _silent(layer: Projection) -> Iterator[None]:
    """Let a layer give nothing, which costs nothing."""

    def forward(given: Tensor) -> Tensor:
        return given.new_zeros(()).expand(*given.shape[:-1], layer.out_features)

    module: Any = layer.module
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class BlockPasses:
    """The passes of the examples through one block whose layers change in between.

    Attention is computed once for a micro-batch: once the layers that make queries, keys and values are settled, its
    result stays the same, and later passes take it from memory.

    Args:
        stream: At the entrance of the block.
        view: The block.
        offload: Where the results of attention are kept.
    """

    def __init__(self, stream: BlockStream, view: LayerView, offload: Offload | None = None) -> None:
        self.stream, self.view = stream, view
        self._contexts: HiddenStates = hidden_states(offload, view.attention_output.weight.device)
        self._known: set[int] = set()

    def rows(self, tensor: Tensor, index: int) -> Tensor:
        """The tokens among what a layer saw, ``(tokens, features)``."""
        return token_rows(tensor, self.stream.mask(index))

    def inputs(self, path: str, index: int) -> Tensor:
        """Rows of the input of a layer."""
        with self._attention(index), watched({path: self.view.linear(path).module}, path) as seen:
            self.stream.call(self.view.block, index)
        if path == self.view.architecture.attention.output:
            self._contexts[index] = seen.inputs[path]
            self._known.add(index)
        return self.rows(seen.inputs[path], index)

    def ending(self, site: Site, index: int) -> tuple[Tensor, Tensor]:
        """Of a layer that ends a sublayer, without computing it: rows of its input, and of the residual."""
        path = site.paths[0]
        if site.residual == "input":
            return self.inputs(path, index), self.rows(self.stream.hidden(index), index)
        layer, middle = self.view.linear(path), self.view.architecture.feed_forward.inputs[0]
        modules = {path: layer.module, middle: self.view.linear(middle).module}
        if self.view.pre_norm:  # what is added to nothing comes out as it is
            with self._attention(index), _silent(layer), watched(modules) as seen:
                output = self.stream.call(self.view.block, index)
            return self.rows(seen.inputs[path], index), self.rows(output, index)
        with self._attention(index), watched(modules, path) as seen:
            self.stream.call(self.view.block, index)
        return self.rows(seen.inputs[path], index), self.rows(seen.inputs[middle], index)

    def split(self, seen: Seen, site: Site, output: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Of a layer that ends a sublayer, in a finished pass: rows of its output without bias, and of the residual."""
        path, bias = site.paths[0], self.view.linear(site.paths[0]).bias
        made = self.rows(seen.outputs[path], index)
        if site.residual == "input":
            residual = self.rows(self.stream.hidden(index), index)
        elif self.view.pre_norm:
            residual = self.rows(output, index) - made
        else:  # a norm stands behind the sum, and what goes into the sublayer is what is added to its output
            residual = self.rows(seen.inputs[self.view.architecture.feed_forward.inputs[0]], index)
        return (made if bias is None else made - bias), residual

    def advance(self) -> None:
        """Send all examples through the block as it is now, to the entrance of the next one."""
        for index in range(len(self.stream)):
            with self._attention(index):
                self.stream.replace(index, self.stream.call(self.view.block, index))

    @contextmanager
    def _attention(self, index: int) -> Iterator[None]:
        """Let the attention module hand out what it computed before."""
        if index not in self._known:
            yield
            return
        record = self.view.architecture.attention
        module: Any = self.view.block.get_submodule(record.module)
        inside = record.output.startswith(f"{record.module}.")

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            context = self._contexts[index]
            return (self.view.attention_output.module(context) if inside else context), None

        module.forward = forward
        try:
            yield
        finally:
            del module.forward


class DensePass:
    """What the layers of a block see and make in the dense model, from one pass of the examples.

    Args:
        stream: At the entrance of the block; afterwards at its exit.
        view: The block.
        sites: Whose inputs and outputs are kept.
        offload: Where they are kept.
    """

    def __init__(
        self, stream: BlockStream, view: LayerView, sites: tuple[Site, ...], offload: Offload | None = None
    ) -> None:
        device = view.attention_output.weight.device
        self._kept = {site.paths[0]: [hidden_states(offload, device) for _ in range(2)] for site in sites}
        passes = BlockPasses(stream, view)
        paths = {site.paths[0] for site in sites} | {view.architecture.feed_forward.inputs[0]}
        modules = {path: view.linear(path).module for path in paths}
        for index in range(len(stream)):
            with watched(modules) as seen:
                output = stream.call(view.block, index)
            for site in sites:
                path = site.paths[0]
                for place, rows in zip(self._kept[path], _wanted(passes, site, seen, output, index), strict=False):
                    place[index] = rows
            stream.replace(index, output)

    def wanted(self, site: Site, index: int) -> tuple[Tensor, Tensor]:
        """Of layers that end a sublayer: rows of the output without bias, and of the residual beside it."""
        output, residual = self._kept[site.paths[0]]
        return output[index], residual[index]

    def inputs(self, site: Site, index: int) -> Tensor:
        """Of other layers: rows of the input."""
        return self._kept[site.paths[0]][0][index]


def _wanted(passes: BlockPasses, site: Site, seen: Seen, output: Tensor, index: int) -> tuple[Tensor, ...]:
    path = site.paths[0]
    if not site.residual:
        return (passes.rows(seen.inputs[path], index),)
    return passes.split(seen, site, output, index)
