"""The names of the pruning methods, without what they do: this module is light, so that ``--help`` is quick."""

from shrinkformer.errors import InputError

SHRINK, KWON, KPRUNE = WHOLE_MODEL = ("shrink", "kwon", "kprune")
"""Our own method, and others that measure a model as a whole; they have modules of their own."""

RANKING = (
    "stat",
    "stat-bias",
    "magnitude",
    "magnitude-refit",
    "random",
    "random-refit",
    "wanda",
    "wanda-refit",
    "flap",
    "obs",
)
"""Those that rank heads and neurons: :data:`shrinkformer.prune.methods.METHODS` has one object for each."""

METHOD_NAMES = (SHRINK, *RANKING, KWON, KPRUNE)

DEFAULT_METHOD = SHRINK


def require_method(name: str, *, uniform: bool = False) -> None:
    """Check the name of a pruning method.

    Args:
        name: Of the method.
        uniform: Whether it shall give all blocks the same sizes.

    Raises:
        InputError: There is none, or it cannot do that.
    """
    if name not in METHOD_NAMES:
        raise InputError(f"--method {name!r} is not known; choose one of {', '.join(METHOD_NAMES)}.")
    if uniform and name == KPRUNE:
        others = ", ".join(other for other in METHOD_NAMES if other != KPRUNE)
        raise InputError(
            f"--uniform: --method {name} chooses the size of a block when those before it are pruned; "
            f"choose one of {others}."
        )
