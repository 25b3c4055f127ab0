"""Prune an encoder from Python: one call, then an ordinary model.

python examples/prune_in_python.py [folder or hub name] [folder to save to]
"""

import sys

from transformers import AutoModel, AutoTokenizer

import shrinkformer
from shrinkformer.commands.locate import bundled_model
from shrinkformer.dataset.loading import load_split
from shrinkformer.dataset.tasks import get_task


def main() -> None:
    """Prune to half of the MACs, save, load, compare."""
    source = sys.argv[1] if len(sys.argv) > 1 else str(bundled_model())
    target = sys.argv[2] if len(sys.argv) > 2 else "output/example"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype="float32")

    # A few hundred texts like those the model will see; no labels. Here: what is bundled for the demo.
    texts = load_split(get_task("similarity"), "train", data_dir=None, bundled=True)["sentence1"][:512]
    batches = [dict(tokenizer(texts[i : i + 32], padding=True, return_tensors="pt")) for i in range(0, 512, 32)]
    pruned = shrinkformer.prune_model(model, batches, mu=0.5)
    print(f"{pruned.plan.ratio:.3f} of the MACs; heads {pruned.plan.heads}, neurons {pruned.plan.neurons}")

    shrinkformer.save(pruned.model, target, plan=pruned.plan, tokenizer=tokenizer)
    again = shrinkformer.load(target)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} -> {sum(p.numel() for p in again.parameters()):,} parameters"
    )


if __name__ == "__main__":
    main()
