"""Model cards, README.md of what was saved."""

from shrinkformer.prune.plan import Plan
from shrinkformer.prune.sites import EMBEDDINGS, POSITIONS
from shrinkformer.quantize.config import Quantized


def model_card(run_title: str, plan: Plan, source: str, *, stock: bool = False) -> str:
    """README.md of a pruned checkpoint; ``stock``: it needs no code but that of transformers."""
    trust = "" if stock else ", trust_remote_code=True"
    brought = "the blocks have the shape of stock classes" if stock else "the folder brings its own classes"
    rows = "\n".join(
        f"| {index} | {heads} | {neurons} |"
        for index, (heads, neurons) in enumerate(zip(plan.heads, plan.neurons, strict=True))
    )
    return f"""---
library_name: transformers
tags: [shrinkformer, pruned]
---
# {run_title}

`{source}`, pruned by shrinkformer to {plan.ratio:.4f} of its MACs without retraining
(method `{plan.method}`, mu {plan.mu:g}, seed {plan.seed}; MACs at {plan.sequence_length:.2f} tokens).

```python
import shrinkformer                                # pip install shrinkformer
model = shrinkformer.load("path/to/this/folder")

from transformers import AutoModel                 # or without it: {brought}
model = AutoModel.from_pretrained("path/to/this/folder"{trust})
```

| layer | heads | neurons |
|---|---|---|
{rows}
"""


_LOADING = {
    "compressed-tensors": ".from_pretrained(folder{trust})   # pip install compressed-tensors",
    "gptq": ".from_pretrained(folder{trust})   # pip install gptqmodel optimum",
    "float": ".from_pretrained(folder{trust})",
}


def quantized_card(
    title: str, found: Quantized, plan: Plan | None, source: str, kind: str, *, stock: bool = False
) -> str:
    """README.md of a quantized checkpoint; ``stock``: it needs no code of ours."""
    config = found.config
    pruned = "" if plan is None else f" after pruning to {plan.ratio:.4f} of its MACs (method `{plan.method}`)"
    trust = "" if plan is None or stock else ", trust_remote_code=True"
    if kind == "onnx":
        loading = 'import onnxruntime\nsession = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")'
    else:
        loading = "import shrinkformer                                # pip install shrinkformer\n"
        loading += 'model = shrinkformer.load("path/to/this/folder")\n\n'
        if config.bits_of is not None and {EMBEDDINGS, POSITIONS} & set(config.also):
            loading += "# no other reader takes embeddings as integers together with several numbers of bits"
        else:
            loading += "# or without it, with the Auto class of the task:\n"
            loading += "# model = AutoModelFor..." + _LOADING[kind].format(trust=trust)
    return f"""---
library_name: transformers
tags: [shrinkformer, quantized]
---
# {title}

`{source}`, quantized by shrinkformer to {config.amount} without retraining{pruned}: {config.storage}, layers
`{config.layers}`, quantizer `{config.quantizer}`, format `{kind}`.

```python
{loading}
```
"""
