"""The linear layers of a block that are quantized together, because they see the same input."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shrinkformer.errors import InputError

if TYPE_CHECKING:
    from shrinkformer.architectures import Architecture  # takes the seconds that torch takes, and --help lists SCOPES

SCOPES = ("attention", "ffn", "all")

EMBEDDINGS, HEAD, POSITIONS = OUTSIDE = ("embeddings", "head", "positions")


@dataclass(frozen=True)
class Site:
    """Layers with one input; paths are relative to the block.

    Attributes:
        paths: Of the layers.
        residual: What is added to the output of the layers: ``"input"`` (of the block), ``"inner"`` (the hidden
            states between the sublayers), or "" where nothing is, because the layers do not end a sublayer.
    """

    paths: tuple[str, ...]
    residual: str = ""


def block_sites(architecture: "Architecture", scope: str = "all") -> tuple[Site, ...]:
    """The sites of every block of an architecture, in the order in which data passes them.

    Args:
        architecture: The record.
        scope: ``attention``, ``ffn`` or ``all``.

    Raises:
        InputError: There is no such scope.
    """
    if scope not in SCOPES:
        raise InputError(f"--layers {scope!r}: choose one of {', '.join(SCOPES)}.")
    attention, feed_forward = architecture.attention, architecture.feed_forward
    sites: tuple[Site, ...] = ()
    if scope != "ffn":
        sites += (Site(attention.producers), Site((attention.output,), "input"))
    if scope != "attention":
        sites += (Site(feed_forward.inputs), Site((feed_forward.output,), "inner"))
    return sites
