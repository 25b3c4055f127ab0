"""Pruned transformers as ordinary classes of transformers.

Every checkpoint that shrinkformer writes holds a copy of this file, so it must import nothing but torch and
transformers. It turns a stock class into one whose blocks have the sizes in ``config.shrinkformer["layers"]``:
this file's ``BertForQuestionAnswering`` is that of transformers with smaller linear layers, nothing else. The names are
the same, because pipelines, trainers and exporters look at them. The classes are made on demand (PEP 562), because the
set of stock classes is not ours to list. Configurations bring this file along wherever they are saved, so that whatever
saves the model, ``save_pretrained``, a Trainer or sentence-transformers, makes a folder that loads again.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

PLAN_FILE = "shrinkformer_plan.json"

_CACHE_LINE = 64

_AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}
"""The Auto class of a model with a head, by how the name of its class ends."""


def set_block_sizes(
    block: nn.Module,
    architecture: dict[str, Any],
    *,
    heads: int,
    neurons: int,
    query_width: int | None = None,
    value_width: int | None = None,
) -> None:
    """Give one block new, uninitialised linear layers of the given sizes, and matching head attributes.

    Args:
        block: A transformer block; changed in place.
        architecture: The architecture record as a dictionary: paths and attribute names.
        heads: Number of attention heads, at least 1; with grouped queries, of key and value heads.
        neurons: Number of feed-forward neurons, at least 1.
        query_width: Width of a head's queries and keys; None leaves it as it is.
        value_width: Width of a head's values; None leaves it as it is.

    Where the two widths differ, the attention module becomes one that knows both, see :func:`narrow_attention`; its
    layers are ordinary ones, which others may wrap or replace.
    """
    attention, feed_forward = architecture["attention"], architecture["feed_forward"]
    module: Any = block.get_submodule(attention["module"])
    before = int(getattr(module, attention["head_size_attribute"]))
    query_width = query_width or int(getattr(module, "query_width", before))
    value_width = value_width or int(getattr(module, "value_width", before))
    width = max(query_width, value_width)
    shared_by = attention.get("queries_attribute")
    queries = heads * int(getattr(module, shared_by)) if shared_by else heads
    if attention.get("fused"):
        _resize(block, attention["query"], outputs=3 * heads * width)
    else:
        _resize(block, attention["query"], outputs=queries * query_width)
        _resize(block, attention["key"], outputs=heads * query_width)
        _resize(block, attention["value"], outputs=heads * value_width)
    _resize(block, attention["output"], inputs=queries * value_width)
    if (query_width, value_width) != (before, before):
        setattr(module, attention["head_size_attribute"], width)
        module.query_width, module.value_width = query_width, value_width
    module.__class__ = _stock(module.__class__)
    if query_width != value_width:
        module.__class__ = narrow_attention(module.__class__)
        inside = f"{attention['module']}."
        parts = ("query", "key") if query_width < value_width else ("value",)
        module.padded = [attention[part].removeprefix(inside) for part in parts]
        module.cut = attention["output"].removeprefix(inside) if attention["output"].startswith(inside) else ""
    for path in feed_forward["inputs"]:
        _resize(block, path, outputs=neurons)
    _resize(block, feed_forward["output"], inputs=neurons)
    for name in attention["heads_attributes"]:
        setattr(module, name, heads)
    for name in attention["width_attributes"]:
        setattr(module, name, heads * width)


@functools.cache
def narrow_attention(stock: Any) -> Any:
    """The class of attention modules whose queries and keys, or whose values, are narrower than their heads.

    Stock code runs as it is, with heads of one width: behind narrower vectors it finds zeros, which change no score and
    no context, and the zeros of contexts are gone before the output projection.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        context, *rest = stock.forward(_Widened(self), *args, **kwargs)
        if self.value_width < self.query_width and not self.cut:  # the output projection is in another module
            context = _cut(context, self.value_width, self.query_width)
        return (context, *rest)

    def __reduce_ex__(self: Any, _protocol: Any) -> Any:  # noqa: N807
        return _empty, (narrow_attention, stock), self.__dict__  # classes made on demand are not found by name

    own = {"forward": forward, "__reduce_ex__": __reduce_ex__, "__module__": __name__, "made_from": stock}
    return type(stock.__name__, (stock,), own)


class _Widened:
    """What stock code takes for its attention module: all its attributes, but layers that give and take wide heads.

    It asks the module for its layers whenever it runs, so that a layer may be anything that computes the same.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        narrow, wide = sorted((module.query_width, module.value_width))
        for name in module.padded:
            setattr(self, name, _padding(getattr(module, name), narrow, wide))
        if module.value_width < module.query_width and module.cut:
            setattr(self, module.cut, _cutting(getattr(module, module.cut), narrow, wide))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _padding(layer: Callable[[Tensor], Tensor], narrow: int, wide: int) -> Callable[[Tensor], Tensor]:
    def padded(hidden: Tensor) -> Tensor:
        output = layer(hidden)
        heads = output.view(*output.shape[:-1], -1, narrow)
        return nn.functional.pad(heads, (0, wide - narrow)).flatten(-2)

    return padded


def _cutting(layer: Callable[[Tensor], Tensor], narrow: int, wide: int) -> Callable[[Tensor], Tensor]:
    return lambda context: layer(_cut(context, narrow, wide))


def _cut(context: Tensor, narrow: int, wide: int) -> Tensor:
    """Contexts without the zeros behind the values of each head."""
    return context.view(*context.shape[:-1], -1, wide)[..., :narrow].flatten(-2)


def _stock(made: Any) -> Any:
    """The class that one of this file's was made from; another class is its own."""
    return vars(made).get("made_from", made)


def _empty(make: Callable[[Any], Any], stock: Any) -> Any:
    """For pickle: an object of a class that is made on demand, before it gets its state."""
    made = make(stock)
    return made.__new__(made)


def _resize(block: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None) -> None:
    old: Any = block.get_submodule(path)
    transposed = isinstance(old, Conv1D)  # GPT-2 stores its weights as (inputs, outputs)
    before = old.weight.shape if transposed else old.weight.shape[::-1]
    sizes = (before[0] if inputs is None else inputs, before[1] if outputs is None else outputs)
    with torch.device("meta"):  # no random numbers are drawn: the weights come from the checkpoint or from the surgery
        new = Conv1D(sizes[1], sizes[0]) if transposed else nn.Linear(*sizes, bias=old.bias is not None)
    new = new.to(old.weight.dtype).to_empty(device=old.weight.device)
    for parameter, name in ((old.get_parameter(name), name) for name, _ in new.named_parameters()):
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, new)


def resize_model(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give every block of a model the sizes in ``config.shrinkformer``; in place."""
    section = config.shrinkformer
    blocks: Any = model.base_model.get_submodule(section["architecture"]["layers"])
    for block, sizes in zip(blocks, section["layers"], strict=True):
        set_block_sizes(block, section["architecture"], **sizes)


def adopt(model: PreTrainedModel) -> None:
    """Give a model, the base model in it and their configuration the classes that load and save it whole; in place.

    They are stock classes again where the configuration has no sizes of blocks. Classes of users stay as they are.
    """
    adopt_config(model.config)
    for part in (model, model.base_model):
        stock = _stock(type(part))
        known = _is_sized(model.config) and getattr(transformers, stock.__name__, None) is stock
        part.__class__ = pruned_class(stock) if known else stock


def adopt_config(config: PreTrainedConfig) -> None:
    """Give a configuration the class that brings this file along, or that of transformers; in place."""
    stock, folder = _stock(type(config)), config.name_or_path
    config.__class__ = pruned_config(stock) if _is_sized(config) else stock
    if _is_sized(config) and folder and "plan_text" not in vars(config):  # it comes from that folder unchanged
        file = Path(folder, PLAN_FILE)
        if file.is_file():
            config.plan_text = file.read_text(encoding="utf-8")


def _is_sized(config: PreTrainedConfig) -> bool:
    return bool((getattr(config, "shrinkformer", None) or {}).get("layers"))


def align(model: nn.Module) -> None:
    """Copy weights that begin in the middle of a cache line, as they do where a file is mapped; in place.

    Kernels for small inputs add up in another order then, and take longer: outputs would not be equal to the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _CACHE_LINE:
            tensor.data = tensor.data.clone()


@functools.cache
def pruned_class(stock: Any) -> type[PreTrainedModel]:
    """The class that loads pruned checkpoints of a stock class, such as ``BertModel``."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        # Stock code reads one global size per config; it must see the sizes before pruning while it builds its modules.
        overrides = config.to_dict().get("per_layer_config")
        config.per_layer_config = None
        try:
            stock.__init__(self, config, *args, **kwargs)
        finally:
            config.per_layer_config = overrides
        if _is_sized(config):  # overrides cannot say widths of heads
            resize_model(self, config)
            for module in self.base_model.get_submodule(config.shrinkformer["architecture"]["layers"]).modules():
                vars(module).pop("_is_hf_initialized", None)  # stock code initialised the layers before these
            self.init_weights()  # nothing on the meta device, where from_pretrained builds models
            adopt(self)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found = super(made, cls).from_pretrained(*args, **kwargs)
        align(found[0] if isinstance(found, tuple) else found)
        return found

    # Weights have the stock class's names, so its renames between versions of transformers hold for ours as well.
    own = {"__init__": __init__, "from_pretrained": classmethod(from_pretrained), "made_from": stock}
    own |= {"is_custom_code": classmethod(lambda _cls: stock.is_custom_code())}
    # ``__module__`` must be this file: ``save_pretrained`` copies the file of the class into the new checkpoint.
    made: type[PreTrainedModel] = type(stock.__name__, (stock,), {**own, "__module__": __name__})
    return made


@functools.cache
def pruned_config(stock: Any) -> Any:
    """The class of configurations that bring along, wherever they are saved, what reads the sizes in them.

    Whatever saves a model saves its configuration: stock models around a pruned one, too, which share it.
    """

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        folder, code = Path(save_directory), Path(__file__)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / code.name).write_bytes(code.read_bytes())
        (folder / PLAN_FILE).unlink(missing_ok=True)  # of what was saved there before
        if vars(self).get("plan_text"):
            (folder / PLAN_FILE).write_text(self.plan_text, encoding="utf-8")
        self.auto_map = _auto_map(self)
        stock.save_pretrained(self, save_directory, *args, **kwargs)

    def to_dict(self: Any) -> dict[str, Any]:
        entries: dict[str, Any] = stock.to_dict(self)
        entries.pop("plan_text", None)  # has a file of its own
        return entries

    def __reduce_ex__(self: Any, _protocol: Any) -> Any:  # noqa: N807
        return _empty, (pruned_config, stock), self.__dict__

    own = {"save_pretrained": save_pretrained, "to_dict": to_dict, "__reduce_ex__": __reduce_ex__, "made_from": stock}
    return type(stock.__name__, (stock,), {**own, "__module__": stock.__module__})


def auto_class(architecture: str) -> str:
    """The Auto class that opens a model by the name of its class: ``AutoModel`` where it has no head that we know."""
    return next((auto for ending, auto in _AUTO_CLASSES.items() if architecture.endswith(ending)), "AutoModel")


def _auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """Which class of the folder each Auto class should use: the model's own, and all others of its family."""
    module, name = Path(__file__).stem, (config.architectures or [""])[0]
    stock, entries = _stock(type(config)), dict[str, str]()
    for auto in (name for name in dir(transformers) if name.startswith("AutoModel")):  # new heads are made by these
        classes = getattr(getattr(transformers, auto), "_model_mapping", {})
        made = classes.get(stock, None)
        if isinstance(made, type) and hasattr(transformers, made.__name__):
            entries[auto] = f"{module}.{made.__name__}"
    if auto_class(name) != "AutoModel" and hasattr(transformers, name):
        entries[auto_class(name)] = f"{module}.{name}"
    return entries


def __getattr__(name: str) -> Any:
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(stock)


__all__ = [
    "adopt",
    "adopt_config",
    "align",
    "auto_class",
    "pruned_class",
    "pruned_config",
    "resize_model",
    "set_block_sizes",
]
