"""Valid tiny checkpoints and data sets, which `benchmarks/malformed.py` damages; made from configurations and seeds."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "fish",
    "man",
    "woman",
    "child",
    "sees",
    "likes",
    "eats",
    "finds",
    "small",
    "big",
    "red",
    "blue",
    "old",
    "new",
    "house",
]

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": len(WORDS) + 5}

MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", {"intermediate_size": 32, "max_position_embeddings": 40}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32, "max_position_embeddings": 40},
    ),
    "squad": ("BertConfig", "BertForQuestionAnswering", {"intermediate_size": 32, "max_position_embeddings": 40}),
    "encoder": ("BertConfig", "BertModel", {"intermediate_size": 32, "max_position_embeddings": 40}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 40, "pad_token_id": 0},
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 40, "pad_token_id": 0},
    ),
}
"""Class of the configuration, class of the model, and sizes, by name of the base."""

DECODERS = ("opt", "llama", "quantized", "sharded")


def make_bases(folder: Path) -> None:
    """Write every base: a folder with ``model``, ``data``, and nothing else.

    Beside those of :data:`MODELS` there are ``bin`` (a BERT as ``pytorch_model.bin``), ``sharded`` (a Llama in several
    files), ``pruned`` (a BERT of this package) and ``quantized`` (a Llama of this package, 4 bits).
    """
    from shrinkformer import QuantizeConfig, prune_model, quantize_, save
    from shrinkformer.quantize.checkpoint import save as save_quantized

    tokenizer = make_tokenizer()
    built = {name: _model(name) for name in MODELS}
    for name, model in built.items():
        model.save_pretrained(folder / name / "model")
    _side_files(folder / "encoder" / "model")
    built["llama"].save_pretrained(folder / "sharded" / "model", max_shard_size="5KB")
    (folder / "bin" / "model").mkdir(parents=True)
    shutil.copyfile(folder / "bert" / "model" / "config.json", folder / "bin" / "model" / "config.json")
    torch.save(built["bert"].state_dict(), folder / "bin" / "model" / "pytorch_model.bin")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(WORDS), (8, 12), generator=generator)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    pruned = prune_model(_model("bert"), batches, mu=0.5, method="stat")
    save(pruned.model, folder / "pruned" / "model", plan=pruned.plan)
    (folder / "quantized").mkdir()
    model = _model("llama")
    found = quantize_(model, batches, QuantizeConfig(bits=4, group_size=16, quantizer="rtn"))
    save_quantized(model, found.weights, folder / "quantized" / "model")
    for base in folder.iterdir():
        tokenizer.save_pretrained(base / "model")
        write_data(base / "data")


def _model(name: str) -> PreTrainedModel:
    config_class, model_class, sizes = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = {"vocab_size": SIZES["vocab_size"]} if name == "distilbert" else SIZES
        config = getattr(transformers, config_class)(**(own | sizes | {"initializer_range": 0.2}))
        model: PreTrainedModel = getattr(transformers, model_class)(config)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of BERT."""
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=40, **dict(zip(names, SPECIAL, strict=True)))


def _side_files(model: Path) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16}))
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n\n# A model\n")


def rows(count: int) -> list[dict[str, Any]]:
    """Examples of sst2 with labels."""
    texts = [
        " ".join(WORDS[(7 * row + 3 * place) % len(WORDS)] for place in range(3 + row % 5)) for row in range(count)
    ]
    return [{"sentence": text, "label": row % 2} for row, text in enumerate(texts)]


def questions(count: int) -> list[dict[str, Any]]:
    """Examples of squad."""
    made: list[dict[str, Any]] = []
    for row in rows(count):
        word = row["sentence"].split()[1]
        answers = {"text": [word], "answer_start": [row["sentence"].index(word)]}
        made.append({"id": str(len(made)), "context": row["sentence"], "question": "who sees", "answers": answers})
    return made


def pairs(count: int) -> list[dict[str, Any]]:
    """Examples of stsb."""
    texts = [row["sentence"] for row in rows(count)]
    return [
        {"sentence1": text, "sentence2": texts[-1 - number], "label": float(number % 5)}
        for number, text in enumerate(texts)
    ]


def write_data(folder: Path) -> None:
    """Data of every kind of task, in the layout of ``--data_dir``."""
    for split, count in (("train", 8), ("validation", 6)):
        for name, made in (("glue/sst2", rows(count)), ("squad", questions(count)), ("glue/stsb", pairs(count))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in made)
            (folder / name / f"{split}.jsonl").write_text(text)
    text = "".join(row["sentence"] + "\n" for row in rows(30))
    for name, splits in (("wikitext2", ("train", "test")), ("ptb", ("train", "test")), ("c4", ("train", "validation"))):
        (folder / name).mkdir()
        for split in splits:
            long = text if name != "c4" else "\n".join([text.replace("\n", " ")] * 4)
            (folder / name / f"{split}.txt").write_text(long)


_BERT = ["--model_name", "model", "--data_dir", "data", "--sample_batch_size", "4", "--batch_size", "4"]
_OPT = ["--model_name", "model", "--data_dir", "data", "--batch_size", "2"]
_PRUNE = ["--method", "magnitude", "--mu", "0.5"]
_QUANTIZE = ["--mu", "1", "--bits", "4", "--group_size", "16", "--quantizer", "rtn"]

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "prune_bert": (*_BERT, *_PRUNE),
    "quantize_bert": (*_BERT, *_QUANTIZE),
    "evaluate": (*_BERT,),
    "prune_opt": (*_OPT, *_PRUNE, "--sample_batch_size", "2", "--sequence_length", "16"),
    "quantize_opt": (*_OPT, *_QUANTIZE, "--sample_batch_size", "2", "--sequence_length", "16"),
    "opt_eval": (*_OPT, "--sequence_length", "16"),
    "inspect": ("model",),
    "latency": ("model", "--batch", "1", "--length", "4", "--repeats", "1"),
    "export": ("model", "--output", "output/exported"),
    "push": ("model", "tester/tiny"),
    "load": ("model",),
}
"""Arguments of every command on a base, without the task."""

_ENCODING = ("prune_bert", "inspect", "evaluate", "latency", "quantize_bert")
_DECODING = ("prune_opt", "inspect", "opt_eval", "latency", "quantize_opt")

FITTING: Mapping[str, tuple[str, ...]] = {
    "bert": (*_ENCODING, "export", "push"),
    "distilbert": _ENCODING,
    "squad": ("prune_bert", "evaluate"),
    "encoder": ("prune_bert", "export"),
    "bin": ("prune_bert", "evaluate", "latency"),
    "opt": (*_DECODING, "export"),
    "llama": _DECODING,
    "sharded": (*_DECODING, "push"),
    "pruned": ("load", "inspect", "evaluate", "latency"),
    "quantized": ("load", "inspect", "opt_eval", "latency"),
}
"""Commands that a base is a valid input of."""

TASKS = {"squad": "squad", "encoder": "similarity"}


def arguments_of(base: str, command: str) -> list[str]:
    """The command line of a command on a base, without the command."""
    task = ["--task_name", TASKS.get(base, "sst2")] if command in {"prune_bert", "quantize_bert", "evaluate"} else []
    return [*COMMANDS[command], *task]
