"""What is done to find good codes. The storage, and so the size, is the same whatever is done."""

from dataclasses import dataclass, replace

from shrinkformer.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """The steps of a quantizer.

    Attributes:
        name: As on the command line.
        look_ahead: Round column by column and let the columns behind make up for each error (GPTQ); otherwise every
            weight goes to its nearest code, and no examples are needed.
        by_activity: Round columns with a large second moment first.
        search: Search the ranges of grids, with both signs of symmetric scales; otherwise take minimum and maximum.
        static: Fit all grids beforehand; otherwise each when its first column is due, to what it has become by then.
        attempts: Sizes of grids that are tried by rounding ahead, at most; each row keeps its best.
        rounds: Of refitted scales and coordinate descent, after rounding.
        sweeps: Of coordinate descent in one round, at most.
        sequential: Every layer sees inputs from quantized layers of its own block too; otherwise of earlier blocks.
        correct: Aim at the dense model's outputs given the quantized model's inputs, and let biases take up means.
        output_aware: Weigh errors by what they do to the model's predictions, and let later outputs of a layer make up
            for the errors of earlier ones; needs the whole model in memory, otherwise it is left out.
        fast: Let processors round what goes into products while examples pass, where the bits are few.
        damping: Of the second moments, relative to their mean diagonal.
    """

    name: str
    look_ahead: bool = True
    by_activity: bool = True
    search: bool = True
    static: bool = True
    attempts: int = 16
    rounds: int = 2
    sweeps: int = 1
    sequential: bool = True
    correct: bool = True
    output_aware: bool = True
    fast: bool = True
    damping: float = 0.01


# As published: Frantar et al., arXiv 2210.17323, with the defaults of its code.
_GPTQ = Recipe(
    "gptq",
    by_activity=False,
    search=False,
    static=False,
    attempts=1,
    rounds=0,
    sequential=False,
    correct=False,
    output_aware=False,
    fast=False,
)

RECIPES = {recipe.name: recipe for recipe in (Recipe("shrink"), _GPTQ, replace(_GPTQ, name="rtn", look_ahead=False))}

DEFAULT_QUANTIZER = "shrink"


def get_recipe(name: str) -> Recipe:
    """The recipe of a quantizer.

    Raises:
        InputError: There is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"--quantizer {name!r}: choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]
