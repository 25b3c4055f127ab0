"""Fixtures that many tests share: tiny models built from configs, nothing downloaded."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: a test that asks the hub by mistake fails at once

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent

WITHOUT_US = """
import sys, torch, transformers

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "shrinkformer":
            raise ImportError("shrinkformer is not installed here")

sys.meta_path.insert(0, Blocker())
"""
"""Begins programs that run as on a machine where shrinkformer is not installed."""

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
    "holds",
    "small",
    "big",
    "red",
    "blue",
    "old",
    "new",
    "house",
    "tree",
    "river",
    "street",
    "book",
    "song",
    "runs",
    "sleeps",
    "sings",
    "never",
    "always",
    "today",
    "and",
    "or",
    "not",
    "is",
    "was",
    "good",
    "bad",
    "film",
    "story",
]

# The architecture records under test: class stem and the config's names for the same six sizes.
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "bert": ("Bert", {}),
    "distilbert": (
        "DistilBert",
        {
            "hidden_size": "dim",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
            "intermediate_size": "hidden_dim",
        },
    ),
    "roberta": ("Roberta", {}),
    "electra": ("Electra", {}),
    "opt": ("OPT", {"intermediate_size": "ffn_dim", "initializer_range": "init_std"}),
    "gpt2": (
        "GPT2",
        {
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
        },
    ),
    "gpt_neox": ("GPTNeoX", {}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "phi": ("Phi", {}),
}

ENCODERS = ("bert", "distilbert", "roberta", "electra")

GROUPED = ("llama", "mistral", "qwen2", "qwen3", "phi")
"""Families whose test models have two query heads for each key and value head."""

EXTRA_SIZES: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 32},
    "opt": {"word_embed_proj_dim": 32},
    "qwen3": {"head_dim": 8},
    **{family: {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2} for family in ("gpt2", "gpt_neox")},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test-slow` asks for GPU tests on any machine; without CUDA they are skipped, not failed."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def transformers_speaks() -> None:
    """A command that a test calls in this process quiets transformers; the next test may listen for its warnings."""
    transformers.utils.logging.set_verbosity_warning()


def task_heads(family: str) -> tuple[str, ...]:
    """Endings of the class names that a family is tested with; the first is the usual one."""
    if family in ENCODERS:
        return ("ForSequenceClassification", "ForQuestionAnswering", "Model")
    return ("LMHeadModel" if family == "gpt2" else "ForCausalLM", "ForSequenceClassification", "Model")


def build_model(family: str = "bert", head: str | None = None, *, seed: int = 0, **sizes: Any) -> Any:
    """A tiny model with random weights; the global generator is left as it was."""
    head = task_heads(family)[0] if head is None else head
    stem, names = FAMILIES[family]
    wanted = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "vocab_size": len(WORDS) + 5,
        "max_position_embeddings": 80,
        "num_labels": 2,
        "initializer_range": 0.15,  # large enough for layers to differ, as trained ones do
    } | sizes
    arguments = {names.get(key, key): value for key, value in wanted.items()}
    if family in GROUPED:
        arguments |= {"num_key_value_heads": wanted["num_attention_heads"] // 2, "pad_token_id": 0, "eos_token_id": 3}
    arguments = EXTRA_SIZES.get(family, {}) | arguments
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{stem}Config")(**arguments)
        model = getattr(transformers, f"{stem}{head}")(config)
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def build_tokenizer(pad_left: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that a BERT would have."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side="left" if pad_left else "right",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_batches(lengths: list[int], *, batch_size: int, seed: int = 0, vocabulary: int = 40) -> list[dict[str, Any]]:
    """Model inputs of the given lengths, padded on the right; the same tokens whatever the batch size."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, vocabulary, (length,), generator=generator) for length in lengths]
    batches = []
    for start in range(0, len(rows), batch_size):
        group = rows[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in group], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.fixture
def batches() -> list[dict[str, Any]]:
    """Calibration inputs: 48 examples, 3 to 20 tokens long."""
    return make_batches([3 + index % 18 for index in range(48)], batch_size=8)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny BERT classifier with its tokenizer, saved as users have it."""
    folder = tmp_path / "tiny-bert"
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def load_script(path: str) -> Any:
    """A Python file of the source tree that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
