"""The names of the formats, without what they do: this module is light, so that ``--help`` is quick."""

DEFAULT_FORMAT = "compressed-tensors"

ONNX = "onnx"

ALL_FORMATS = (DEFAULT_FORMAT, "gptq", "float", ONNX)
"""All but the last are in :data:`shrinkformer.quantize.formats.FORMATS`."""
