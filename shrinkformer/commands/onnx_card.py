"""The section of a model card that says how to run the ONNX file beside it."""

import re
from collections.abc import Mapping

from transformers import PreTrainedConfig

from shrinkformer.export.int8 import Deviation

_ENCODER_CODE = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = "path/to/this/folder"
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_padding(pad_id=%(pad)s)
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx")

rows = tokenizer.encode_batch(["The cat sees a bird.", "A dog runs."])
inputs = {
    "input_ids": np.array([row.ids for row in rows]),
    "attention_mask": np.array([row.attention_mask for row in rows]),
    "token_type_ids": np.array([row.type_ids for row in rows]),
}
wanted = [value.name for value in session.get_inputs()]
names = [value.name for value in session.get_outputs()]
outputs = dict(zip(names, session.run(None, {name: inputs[name] for name in wanted})))
"""

_DECODER_CODE = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = "path/to/this/folder"
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx")
cached = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
names = [value.name for value in session.get_outputs()]

tokens = tokenizer.encode("The cat").ids
past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in cached}
new = tokens
for _ in range(20):
    inputs = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(tokens)), np.int64), **past}
    outputs = dict(zip(names, session.run(None, inputs)))
    past = {value.name: outputs[value.name.replace("past_key_values", "present")] for value in cached}
    new = [int(outputs["logits"][0, -1].argmax())]
    tokens += new
    if new[0] in %(end)s:
        break
print(tokenizer.decode(tokens))
"""


ONNX_TITLE = "## ONNX\n"


def onnx_section(config: PreTrainedConfig, *, cached: bool, tokenizer: bool, int8: Mapping[str, Deviation]) -> str:
    """How to run the ONNX file of a folder with onnxruntime alone.

    Args:
        config: Of the model.
        cached: Whether the file takes and gives keys and values, so that it generates.
        tokenizer: Whether the folder holds ``tokenizer.json``.
        int8: Deviations of the outputs of ``model_int8.onnx``, by name; none where there is no such file.
    """
    end = getattr(config, "eos_token_id", None)
    ends = [token for token in (end if isinstance(end, list) else [end]) if token is not None]
    code = _DECODER_CODE if cached else _ENCODER_CODE
    missing = "" if tokenizer else " The `tokenizer.json` of the model has to be put into this folder first."
    rows = [f"| `{name}` | {deviation.cosine:.4f} | {deviation.relative:.3f} |\n" for name, deviation in int8.items()]
    table = "".join(["\n| `onnx/model_int8.onnx` | cosine | relative difference |\n|---|---|---|\n", *rows])
    return f"""{ONNX_TITLE}
`onnx/model.onnx` gives the same outputs to 1e-4 of the largest.{missing}
`pip install onnxruntime tokenizers` is enough:

```python
{code % {"pad": getattr(config, "pad_token_id", None) or 0, "end": ends}}```
{table if rows else ""}"""


def without_onnx_section(card: str) -> tuple[str, str]:
    """A card without its section on ONNX, and that section, which may be empty."""
    found = re.search(rf"(?ms)^{ONNX_TITLE}.*?(?=^## |\Z)", card)
    if found is None:
        return card.rstrip(), ""
    return (card[: found.start()] + card[found.end() :]).rstrip(), found.group()
