"""What a run may use: where weights come from, where large data goes, and with whom the work is shared."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from shrinkformer.prune.hidden import Offload
from shrinkformer.prune.ledger import Ledger
from shrinkformer.prune.resume import BlockStore
from shrinkformer.utils.parallel import ALONE, Workers


class BlockWeights(Protocol):
    """Where the weights of the blocks are."""

    def resident(self, block: int) -> AbstractContextManager[object]:
        """Keep the weights of one block on the device."""


class InMemory:
    """All weights are where they are needed."""

    def resident(self, block: int) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()


@dataclass(frozen=True)
class Resources:
    """What calibration and pruning may use; the default is one process with everything in memory.

    Attributes:
        weights: Puts a block's weights on the device while it is worked on.
        offload: Where hidden states go that do not fit; with it, second moments are kept in ``store`` only.
        store: Keeps the second moments of finished blocks on disk, and gives back those of an interrupted run.
        workers: The processes that share the calibration examples.
        ledger: What an interrupted run found, and where what is found now is kept.
    """

    weights: BlockWeights = field(default_factory=InMemory)
    offload: Offload | None = None
    store: BlockStore | None = None
    workers: Workers = ALONE
    ledger: Ledger = field(default_factory=Ledger)
