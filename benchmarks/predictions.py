"""How far the divergence on examples set aside is from what the method ``shrink`` predicted, on the bundled models.

    python -m benchmarks.predictions [--examples 256 64 32] [--mu 0.8 0.6 0.4] [--search_seconds 10]

The factor beyond which a run warns (``shrinkformer.prune.plan.SURPRISE``) is to lie above all of these. Nothing is
evaluated, saved or written.
"""

import argparse
import warnings
from collections.abc import Sequence

from shrinkformer.commands import prune_bert, prune_opt
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import load_model
from shrinkformer.commands.options import DecoderOptions, EncoderOptions
from shrinkformer.commands.session import Job
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.utils.parallel import ALONE


def jobs(examples: int, length: int) -> list[tuple[str, Job]]:
    """The bundled encoder and the bundled language model, calibrated on so many examples."""
    encoder = EncoderOptions(bundled_data=True, sample_batch_size=examples)
    decoder = DecoderOptions(bundled_data=True, sample_batch_size=examples, sequence_length=length)
    return [
        ("all-MiniLM-L6-v2", prune_bert.read_job(encoder, "cpu", ALONE)),
        ("opt-mini", prune_opt.read_job(decoder, "cpu", ALONE)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per model, number of examples and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[256, 64, 32])
    parser.add_argument("--mu", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--search_seconds", type=float, default=10.0)
    parser.add_argument("--sequence_length", type=int, default=128, help="of the language model's windows")
    options = parser.parse_args(arguments)
    quiet_libraries()
    warnings.simplefilter("ignore")
    config = ShrinkConfig(search_seconds=options.search_seconds)
    print(f"{'model':20}{'examples':>9}{'mu':>6}{'predicted':>11}{'measured':>10}{'ratio':>7}  taken")
    for examples in options.examples:
        for name, job in jobs(examples, options.sequence_length):
            model, _ = load_model(job.source, job.chosen, job.device, job.dtype)
            learnt = calibrate(model, job.batches, config=config)
            for mu in options.mu:
                plan = learnt.prune(Budget(mu, job.sequence_length)).plan
                predicted, measured = plan.prediction["predicted"], plan.prediction["measured"]
                taken = min(plan.divergences, key=plan.divergences.__getitem__)
                figures = f"{predicted:>11.5f}{measured:>10.5f}{measured / predicted:>7.2f}"
                print(f"{name:20}{examples:>9}{mu:>6g}{figures}  {taken}", flush=True)


if __name__ == "__main__":
    main()
