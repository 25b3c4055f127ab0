"""Whatever people pass: every form of the same examples gives the same plan, and anything else is one clear error."""

import re
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pandas
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerFast

import shrinkformer
from shrinkformer.dataset.batches import as_batches
from shrinkformer.dataset.given import Words, pieces_of
from shrinkformer.errors import InputError, ShrinkformerError, ShrinkformerWarning
from tests.conftest import WORDS, build_model, build_tokenizer

TEXTS = [" ".join(WORDS[(3 * index + k) % len(WORDS)] for k in range(2 + index % 9)) for index in range(24)]
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))
TOKENIZER = build_tokenizer()
MODEL = build_model()
PADDED = dict(TOKENIZER(TEXTS, padding=True, return_tensors="pt"))
IDS, MASK = PADDED["input_ids"], PADDED["attention_mask"]
ROWS = [dict(TOKENIZER(text)) for text in TEXTS]
LABELLED = [{**row, "labels": 1, "special_tokens_mask": [0] * len(row["input_ids"])} for row in ROWS]


class MapStyle(Dataset[Any]):
    """A data set of torch as people write it: no iteration."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Any:
        return {name: torch.tensor(values) for name, values in ROWS[index % len(ROWS)].items()}


def hub_rows(kind: str | None = None) -> datasets.Dataset:
    found = datasets.Dataset.from_list([{**row, "text": text} for row, text in zip(LABELLED, TEXTS, strict=True)])
    return found.with_format(kind) if kind else found


FORMS: dict[str, Any] = {
    "dicts of tensors": lambda: [{name: value[i : i + 5] for name, value in PADDED.items()} for i in range(0, 24, 5)],
    "one dict": lambda: PADDED,
    "one BatchEncoding of lists": lambda: TOKENIZER(TEXTS),
    "one BatchEncoding of arrays": lambda: TOKENIZER(TEXTS, padding=True, return_tensors="np"),
    "padded to the maximum": lambda: TOKENIZER(TEXTS, padding="max_length", max_length=40, return_tensors="pt"),
    "a list of BatchEncodings": lambda: [TOKENIZER(text, return_tensors="pt") for text in TEXTS],
    "examples": lambda: LABELLED,
    "token ids": lambda: [row["input_ids"] for row in ROWS],
    "tensors of token ids": lambda: [torch.tensor(row["input_ids"]) for row in ROWS],
    "arrays of token ids": lambda: [np.array(row["input_ids"], dtype=np.uint16) for row in ROWS],
    "a map-style data set": MapStyle,
    "a hub data set": hub_rows,
    "with the format of torch": lambda: hub_rows("torch"),
    "with the format of numpy": lambda: hub_rows("numpy"),
    "a stream": lambda: hub_rows().to_iterable_dataset(),
    "loader with a collator": lambda: DataLoader(
        [{"labels": 0, **row} for row in ROWS],  # type: ignore[arg-type]
        batch_size=5,
        collate_fn=DataCollatorWithPadding(TOKENIZER),
    ),
    "loader of tuples": lambda: DataLoader(TensorDataset(IDS, MASK, torch.ones(24)), batch_size=7),
    "types before the mask": lambda: DataLoader(TensorDataset(IDS, PADDED["token_type_ids"], MASK), batch_size=7),
    "loader of padded lists": lambda: DataLoader(
        [{"input_ids": ids.tolist(), "attention_mask": mask.tolist()} for ids, mask in zip(IDS, MASK, strict=True)],  # type: ignore[arg-type]
        batch_size=7,
    ),
    "inputs and labels": lambda: [(PADDED, torch.ones(24))],
    "tuples": lambda: [(IDS[:9], MASK[:9]), (IDS[9:], MASK[9:])],
    "boolean masks": lambda: [{"input_ids": IDS, "attention_mask": MASK.bool()}],
    "a generator": lambda: (dict(row) for row in ROWS),
    "a DataFrame of ids": lambda: pandas.DataFrame(ROWS),
}

WITH_TEXTS: dict[str, Any] = {
    "texts": lambda: TEXTS,
    "an array of texts": lambda: np.array(TEXTS),
    "a column": lambda: pandas.Series(TEXTS),
    "a DataFrame": lambda: pandas.DataFrame({"text": TEXTS, "label": 0}),
    "a hub data set of texts": lambda: datasets.Dataset.from_dict({"sentence": TEXTS, "label": ["good"] * 24}),
    "a loader of texts": lambda: DataLoader(TEXTS, batch_size=2),  # type: ignore[arg-type]
    "batches of texts": lambda: [{"text": TEXTS[:9]}, {"text": TEXTS[9:]}],
}


def rows_of(batches: Any) -> list[list[int]]:
    """The tokens of every example, sorted: forms may change the order."""
    found = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return sorted(found)


WANTED = sorted(row["input_ids"] for row in ROWS)


@pytest.mark.filterwarnings("error::shrinkformer.errors.ShrinkformerWarning")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_token_ids(form: str) -> None:
    batches = as_batches(FORMS[form](), MODEL)
    assert rows_of(batches) == WANTED
    assert all(value.dtype == torch.int64 and value.ndim == 2 for batch in batches for value in batch.values())
    assert all(set(batch) <= {"input_ids", "attention_mask", "token_type_ids"} for batch in batches)
    assert max(batch["input_ids"].shape[1] for batch in batches) == max(map(len, WANTED))
    assert as_batches(batches, MODEL) is batches  # what is ready stays as it is


@pytest.mark.parametrize("form", WITH_TEXTS)
def test_every_form_of_texts(form: str) -> None:
    assert rows_of(as_batches(WITH_TEXTS[form](), MODEL, tokenizer=TOKENIZER)) == WANTED


@pytest.mark.parametrize(
    "pairs",
    [
        PAIRS,
        [list(pair) for pair in PAIRS],
        datasets.Dataset.from_dict({"label": [0] * 24, "premise": TEXTS, "hypothesis": TEXTS[::-1]}),
        pandas.DataFrame({"question1": TEXTS, "question2": TEXTS[::-1]}),
        DataLoader(PAIRS, batch_size=2),  # type: ignore[arg-type]
    ],
    ids=["tuples", "lists", "data set", "frame", "loader"],
)
def test_pairs_of_texts(pairs: Any) -> None:
    batches = as_batches(pairs, MODEL, tokenizer=TOKENIZER)
    assert rows_of(batches) == sorted(TOKENIZER(*pair)["input_ids"] for pair in PAIRS)
    assert all(batch["token_type_ids"].any() for batch in batches)


def test_so_many_and_no_more_of_a_stream_without_end() -> None:
    def endless() -> Any:
        while True:
            yield from ROWS

    assert len(rows_of(as_batches(endless(), MODEL, most=50))) == 50


class TestMasks:
    def test_without_one_everything_counts_and_padding_is_warned_of(self) -> None:
        ended = int((IDS[:, -2:] == 0).all(1).sum())
        with pytest.warns(ShrinkformerWarning, match=f"{ended} of 24 calibration examples have no attention_mask"):
            batches = as_batches([{"input_ids": IDS}], MODEL)
        assert all(bool(batch["attention_mask"].all()) for batch in batches)

    def test_examples_without_tokens_are_left_out(self) -> None:
        mask = MASK.clone()
        mask[3] = 0
        with pytest.warns(ShrinkformerWarning, match="1 of 24 calibration examples have no tokens"):
            assert len(rows_of(as_batches([{"input_ids": IDS, "attention_mask": mask}], MODEL))) == 23

    def test_labels_are_no_mask(self) -> None:
        labels = (IDS % 2 == 0).long()
        with pytest.warns(ShrinkformerWarning, match="no attention_mask"):
            (batch,) = as_batches([(IDS, labels)], MODEL)
        assert set(batch) == {"input_ids", "attention_mask"}


def test_token_types_of_a_model_that_knows_one() -> None:
    with pytest.warns(ShrinkformerWarning, match="the model knows one: they are left out"):
        (batch,) = as_batches(PAIRS, build_model(type_vocab_size=1), tokenizer=TOKENIZER)
    assert "token_type_ids" not in batch


CHOICES = [[(text, TEXTS[0]), (text, TEXTS[-1])] for text in TEXTS]


class TestSeveralChoices:
    MODEL: ClassVar[Any] = build_model("roberta", "ForMultipleChoice")

    def test_texts(self) -> None:
        batches = as_batches(CHOICES, self.MODEL, tokenizer=TOKENIZER)
        assert [tuple(batch["input_ids"].shape[:2]) for batch in batches] == [(24, 2)]
        rows = rows_of([{name: value.flatten(0, 1) for name, value in batch.items()} for batch in batches])
        assert rows == sorted(TOKENIZER(*pair)["input_ids"] for pairs in CHOICES for pair in pairs)

    def test_examples_of_lists(self) -> None:
        given = [dict(TOKENIZER([a for a, _ in one], [b for _, b in one])) for one in CHOICES]
        batches = as_batches(given, self.MODEL)
        wanted = as_batches(CHOICES, self.MODEL, tokenizer=TOKENIZER)
        assert torch.equal(batches[0]["input_ids"], wanted[0]["input_ids"])

    def test_rows_without_choices(self) -> None:
        with pytest.raises(InputError, match=r"RobertaForMultipleChoice takes \(examples, choices, length\)"):
            as_batches(PADDED, self.MODEL)


SPLIT = [text.split() for text in TEXTS]
NER = {"id": [str(index) for index in range(24)], "tokens": SPLIT, "ner_tags": [["O"] * len(words) for words in SPLIT]}
IN_WORDS: dict[str, Any] = {
    "a hub data set": lambda: datasets.Dataset.from_dict(NER),
    "with the format of numpy": lambda: datasets.Dataset.from_dict(NER).with_format("numpy"),
    "a DataFrame": lambda: pandas.DataFrame(NER),
    "columns": lambda: datasets.Dataset.from_dict(NER)[:],
    "batches of columns": lambda: datasets.Dataset.from_dict(NER).batch(5),
    "rows": lambda: [{"words": words, "labels": ["O"]} for words in SPLIT],
    "lists": lambda: SPLIT,
    "tuples": lambda: [{"tokens": tuple(words)} for words in SPLIT],
}


@pytest.mark.parametrize("form", IN_WORDS)
def test_a_list_of_words_is_one_example(form: str) -> None:
    """As data for token classification holds it."""
    wanted = as_batches(datasets.Dataset.from_dict(dict(TOKENIZER(SPLIT, is_split_into_words=True))), MODEL)
    found = as_batches(IN_WORDS[form](), MODEL, tokenizer=TOKENIZER)
    assert sum(len(batch["input_ids"]) for batch in found) == len(SPLIT)
    assert all(torch.equal(*(batch["input_ids"] for batch in pair)) for pair in zip(found, wanted, strict=True))


def test_examples_without_words() -> None:
    found = as_batches([{"tokens": []}, {"tokens": ["dog"]}], MODEL, tokenizer=TOKENIZER)
    assert found[0]["attention_mask"].sum(1).tolist() == [3, 2]


def test_words_of_a_loader_that_transposes_them() -> None:
    rows = [{"tokens": ["a", "b", "c"]}, {"tokens": ["d", "e", "f"]}]
    (piece,) = pieces_of(DataLoader(rows, batch_size=2), None)  # type: ignore[arg-type]
    assert piece.texts == [Words(("a", "b", "c")), Words(("d", "e", "f"))]


def test_words_of_a_byte_level_tokenizer_are_not_glued() -> None:
    bare = Tokenizer(models.BPE(vocab={sign: at for at, sign in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    bare.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="!")
    model = build_model(vocab_size=256)
    found, wanted = (as_batches(given, model, tokenizer=tokenizer) for given in ([{"tokens": ["ab", "c"]}], ["ab c"]))
    assert torch.equal(found[0]["input_ids"], wanted[0]["input_ids"])


def test_the_text_itself_goes_before_its_words() -> None:
    rows = [{"text": text, "tokens": ["other"]} for text in TEXTS]
    found, wanted = (as_batches(given, MODEL, tokenizer=TOKENIZER) for given in (rows, TEXTS))
    assert torch.equal(found[0]["input_ids"], wanted[0]["input_ids"])


def test_texts_and_words_are_not_mixed() -> None:
    with pytest.raises(InputError, match="mixes texts, pairs of texts and lists of words"):
        as_batches([("a b", "c"), ["d", "e", "f"]], MODEL, tokenizer=TOKENIZER)


def test_warnings_point_at_the_caller() -> None:
    config = shrinkformer.PruneConfig(method="stat")
    with pytest.warns(ShrinkformerWarning, match=r"1 of \d+ calibration examples have no tokens") as found:
        shrinkformer.prune_(build_model(), [*ROWS, {"input_ids": [], "attention_mask": []}], config)
    with pytest.warns(ShrinkformerWarning, match="calibration tokens are fewer than .* give more examples") as few:
        shrinkformer.prune_model(build_model(), ROWS[:1], mu=0.5, method="stat")
    assert {Path(str(one.filename)) for one in (*found, *few)} == {Path(__file__)}


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": ([], "the calibration data is empty; give a few hundred"),
    "an empty generator": ((row for row in []), "the calibration data is empty"),
    "None": (None, "the examples are a NoneType; pass token ids"),
    "a number": (3, "the examples are a int; pass"),
    "one text": ("a text", "the examples are one text, 'a text'; pass"),
    "texts alone": (TEXTS, "holds texts; pass tokenizer="),
    "numbers": ([1, 2, 3], "example 0: found a int; pass"),
    "embeddings": ([{"input_ids": torch.rand(2, 3)}], "a Tensor of torch.float32 and shape (2, 3)"),
    "other columns": ([{"pixel_values": torch.ones(2, 5)}], "example 0: no input_ids and no texts, but pixel_values"),
    "four dimensions": ([torch.ones(2, 2, 2, 2, dtype=torch.int64)], "input_ids have 4 dimensions"),
    "a mask of pairs": (
        [{"input_ids": IDS, "attention_mask": MASK[:, None].repeat(1, 12, 1)}],
        "attention_mask and input_ids of an example differ in form",
    ),
    "unknown tokens": ([{"input_ids": IDS + 1000}], "input_ids of the calibration data hold"),
    "too long": ([[5] * 90], "90 tokens in a row, and BertForSequenceClassification takes 80"),
    "splits": (datasets.DatasetDict({"train": hub_rows()}), "a dict of data sets (train); pass one"),
    "no padding": (DataLoader(ROWS, batch_size=4), "the DataLoader cannot make a batch"),  # type: ignore[arg-type]
    "lists of what": (
        [{"utterance": ["a", "b"]}],
        "utterance holds a list of texts; the words of one example go under",
    ),
    "lists of what, in columns": (pandas.DataFrame({"utterance": [["a", "b"]]}), "utterance holds a list of texts"),
    "a text and a list": ([{"question": "a", "context": ["b", "c"]}], "context holds a list of texts"),
    "which texts": (
        [{"first": "a", "second": "b", "third": "c"}],
        "texts in first, second, third; pass those that make an input alone",
    ),
}


@pytest.mark.filterwarnings("ignore::shrinkformer.errors.ShrinkformerWarning")
@pytest.mark.parametrize("case", WRONG)
def test_anything_else_is_one_clear_line(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(InputError, match=re.escape(message)) as found:
        shrinkformer.prune_model(build_model(), given, mu=0.5, method="stat")
    assert "\n" not in str(found.value)


def test_a_decoder_that_classifies_needs_a_padding_token() -> None:
    model = build_model("gpt2", "ForSequenceClassification", pad_token_id=None)
    with pytest.raises(ShrinkformerError, match=r"model\.config\.pad_token_id"):
        as_batches(ROWS, model)


@pytest.mark.parametrize("form", ["a hub data set", "loader of tuples", "a generator", "token ids"])
def test_doors(form: str) -> None:
    """Every door takes every form, and comes to the same."""
    wanted = shrinkformer.calibrate(MODEL, as_batches(FORMS[form](), MODEL), method="stat")
    plan = wanted.prune(shrinkformer.Budget(0.5, 8.0)).plan
    config = shrinkformer.PruneConfig(method="stat", sequence_length=8.0)
    assert shrinkformer.calibrate(MODEL, FORMS[form](), method="stat").prune(shrinkformer.Budget(0.5, 8.0)).plan == plan
    assert shrinkformer.prune_model(MODEL, FORMS[form](), mu=0.5, method="stat", sequence_length=8.0).plan == plan
    assert shrinkformer.prune_(build_model(), FORMS[form](), config).heads == plan.heads
    model = build_model()
    assert shrinkformer.quantize_(model, FORMS[form](), shrinkformer.QuantizeConfig(bits=8, group_size=16)).weights


def test_texts_at_the_doors() -> None:
    config = shrinkformer.PruneConfig(method="stat")
    plan = shrinkformer.prune_(build_model(), TEXTS, config, tokenizer=TOKENIZER)
    assert plan.heads == shrinkformer.prune_(build_model(), BatchEncoding(TOKENIZER(TEXTS)), config).heads
