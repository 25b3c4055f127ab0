"""The lm-evaluation-harness on a model in memory, on tasks of our own: nothing is downloaded."""

import json
import math
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from shrinkformer.errors import DataError, InputError
from shrinkformer.evaluate.harness import _figures, _load, _require_tasks, run_harness
from shrinkformer.evaluate.perplexity import accumulate
from tests.test_corpora import END, decoder_tokenizer

ROWS = [
    {"question": f"the cat sees the {word}", "choices": ["dog", "tree", "red river"], "answer": row % 3}
    for row, word in enumerate(["dog", "old bird", "man", "fish", "house by the river", "tree", "song"])
]

CHOICE = """
task: shrinkformer_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

TEXT = """
task: shrinkformer_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def build_decoder() -> OPTForCausalLM:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    tokens = {"vocab_size": END + 1, "bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = OPTConfig(num_attention_heads=4, max_position_embeddings=64, init_std=0.3, **sizes, **tokens)
        return OPTForCausalLM(config).eval()


def log_likelihoods(model: OPTForCausalLM, text: str) -> torch.Tensor:
    """Log-probability of each byte of a text, the first one after the end-of-text token."""
    ids = torch.tensor([decoder_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        logs = model(ids).logits.double().log_softmax(-1)
    return logs[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks, the data of the third of which is missing."""
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "rows.json"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (folder / "choice.yaml").write_text(CHOICE.format(file=file), encoding="utf-8")
    (folder / "text.yaml").write_text(TEXT.format(file=file), encoding="utf-8")
    lost = TEXT.replace("shrinkformer_text", "shrinkformer_lost").format(file=folder / "lost.json")
    (folder / "lost.yaml").write_text(lost, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def figures(tasks: Path) -> dict[str, float]:
    names = ["shrinkformer_choice", "shrinkformer_text"]
    return run_harness(build_decoder(), decoder_tokenizer(), names, batch_size=2, include_path=tasks)


@pytest.mark.skipif(not find_spec("lm_eval"), reason="the lm-evaluation-harness is not installed")
class TestHarness:
    def test_accuracy_is_that_of_the_likeliest_choice(self, figures):
        model, hits = build_decoder(), []
        for row in ROWS:
            choices = [f"{row['question']} {choice}" for choice in row["choices"]]
            sums = [log_likelihoods(model, text)[len(row["question"]) :].sum().item() for text in choices]
            hits.append(sums.index(max(sums)) == row["answer"])
        assert figures["lm_eval/shrinkformer_choice/acc"] == pytest.approx(sum(hits) / len(ROWS))
        error = np.std(hits, ddof=1) / math.sqrt(len(ROWS))
        assert figures["lm_eval/shrinkformer_choice/acc_stderr"] == pytest.approx(error)

    def test_its_perplexity_is_ours(self, figures):
        """One token is one byte here. The harness puts OPT's end-of-text token in front twice, and has it predicted."""
        model, outputs = build_decoder(), []
        for row in ROWS:
            ids = torch.tensor([[END, *decoder_tokenizer()(row["question"])["input_ids"]]])
            with torch.no_grad():
                outputs.append((ids, model(ids).logits))
        ours, documents = accumulate(outputs), len(ROWS)
        expected = math.exp(ours.nll * ours.tokens / (ours.tokens - documents))
        assert figures["lm_eval/shrinkformer_text/byte_perplexity"] == pytest.approx(expected, rel=1e-5)

    def test_nothing_else_is_reported(self, figures):
        assert {name.rpartition("/")[0] for name in figures} == {
            "lm_eval/shrinkformer_choice",
            "lm_eval/shrinkformer_text",
        }
        assert all(isinstance(value, float) for value in figures.values())

    def test_model_tokenizer_and_generators_are_left_as_they_were(self, tasks):
        model, tokenizer = build_decoder().train(), decoder_tokenizer()
        before = random_states()
        figures = run_harness(model, tokenizer, ["shrinkformer_choice"], batch_size=3, limit=2, include_path=tasks)
        assert random_states() == before
        assert model.training
        assert tokenizer.pad_token is None
        assert figures["lm_eval/shrinkformer_choice/acc"] in (0.0, 0.5, 1.0)  # of two examples

    def test_data_that_cannot_be_had_are_one_line(self, tasks):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(tasks), include_defaults=False)  # to index the defaults takes seconds
        with pytest.raises(DataError, match="--lm_eval shrinkformer_lost: the data could not be loaded") as caught:
            _load(manager, ["shrinkformer_lost"])
        assert "\n" not in str(caught.value)


def test_unknown_tasks_are_named():
    with pytest.raises(InputError, match="--lm_eval no_such_task neither: the lm-evaluation-harness has no such task"):
        _require_tasks(["hellaswag", "no_such_task", "neither"], ["hellaswag", "piqa"])
    _require_tasks(["piqa"], ["hellaswag", "piqa"])


def test_without_the_package_the_flag_and_the_remedy_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"--lm_eval needs .*pip install .*\[lm-eval\]"):
        run_harness(build_decoder(), decoder_tokenizer(), ["hellaswag"], batch_size=1)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 1, "limit": 0}])
def test_numbers_out_of_range_are_named(options):
    with pytest.raises(InputError, match=r"--lm_eval: .*must be at least 1"):
        run_harness(build_decoder(), decoder_tokenizer(), ["hellaswag"], **options)


def test_no_task_is_an_error():
    with pytest.raises(InputError, match="--lm_eval names no task"):
        run_harness(build_decoder(), decoder_tokenizer(), [], batch_size=1)


def test_figures_of_filters_are_told_apart_and_words_are_left_out():
    row = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": 0.1,
        "acc,none": 1,
        "acc_stderr,none": "N/A",
        "sample_len": 7,
    }
    assert _figures({"gsm8k": row}) == {
        "lm_eval/gsm8k/exact_match_strict-match": 0.5,
        "lm_eval/gsm8k/exact_match_strict-match_stderr": 0.1,
        "lm_eval/gsm8k/acc": 1.0,
    }
