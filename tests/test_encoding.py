import random

import dataset_fixtures as made
import datasets
import numpy as np
import pytest
import torch

from shrinkformer.dataset.calibration import sample_calibration, sample_indices
from shrinkformer.dataset.encoding import MAX_QUESTION, encode, padded_batches
from shrinkformer.dataset.targets import answer_tokens, collate, training_rows
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import DataError, InputError

TOKENIZERS = {"bert": made.bert_tokenizer, "roberta": made.roberta_tokenizer, "distilbert": made.distilbert_tokenizer}


class TestEncoding:
    @pytest.mark.parametrize("kind", TOKENIZERS)
    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    def test_batches_hold_every_feature_once_and_unchanged(self, kind, batch_size):
        tokenizer = TOKENIZERS[kind]()
        encoded = encode(made.sentiment(21), get_task("sst2"), tokenizer)
        seen, widths = [], []
        for indices, batch in padded_batches(encoded.features, tokenizer, batch_size):
            widths.append(batch["input_ids"].shape[1])
            assert len(indices) <= batch_size
            assert set(batch) == set(encoded.features[0])
            assert all(tensor.dtype == torch.int64 for tensor in batch.values())
            assert widths[-1] == max(encoded.lengths[index] for index in indices)
            for row, index in enumerate(indices):
                kept = batch["attention_mask"][row].bool()
                assert batch["input_ids"][row][kept].tolist() == encoded.features[index]["input_ids"]
            seen += indices
        assert sorted(seen) == list(range(21))
        assert widths == sorted(widths, reverse=True)

    def test_token_type_ids_follow_the_tokenizer(self):
        task, examples = get_task("mrpc"), made.pairs(3)
        assert 1 in encode(examples, task, made.bert_tokenizer()).features[0]["token_type_ids"]
        assert "token_type_ids" not in encode(examples, task, made.roberta_tokenizer()).features[0]
        assert "token_type_ids" not in encode(examples, task, made.distilbert_tokenizer()).features[0]

    def test_the_shortest_limit_holds(self):
        examples = datasets.Dataset.from_dict({"sentence": ["cat " * 300], "label": [1]})
        task, tokenizer = get_task("sst2"), made.bert_tokenizer()
        assert encode(examples, task, tokenizer).lengths == [64]
        assert encode(examples, task, tokenizer, max_length=10).lengths == [10]
        assert encode(examples, task, made.bert_tokenizer(model_max_length=12)).lengths == [12]
        with pytest.raises(InputError, match="max_length is 0"):
            encode(examples, task, tokenizer, max_length=0)

    def test_sizes_and_labels(self):
        encoded = encode(made.pairs(4), get_task("stsb"), made.bert_tokenizer())
        assert encoded.labels == pytest.approx([0.0, 5 / 3, 10 / 3, 5.0])
        assert encoded.tokens == sum(encoded.lengths)
        assert encoded.mean_length == pytest.approx(np.mean(encoded.lengths))
        assert encoded.windows is None

    def test_similarity_reads_sentences_one_by_one(self):
        examples, tokenizer = made.pairs(6), made.bert_tokenizer()
        encoded = encode(examples, get_task("similarity"), tokenizer)
        texts = [*examples["sentence1"], *examples["sentence2"]]
        assert [feature["input_ids"] for feature in encoded.features] == [tokenizer(text).input_ids for text in texts]
        assert len(encoded.labels) == 6

    def test_missing_column_and_padding_token_and_batch_size(self):
        with pytest.raises(DataError, match="no column question1"):
            encode(made.sentiment(2), get_task("qqp"), made.bert_tokenizer())
        features = [{"input_ids": [0], "attention_mask": [1]}]
        with pytest.raises(InputError, match="no padding token"):
            next(padded_batches(features, made.bare_tokenizer(), 2))
        with pytest.raises(InputError, match="--batch_size 0"):
            next(padded_batches(features, made.bert_tokenizer(), 0))


class TestWindows:
    @pytest.mark.parametrize("kind", TOKENIZERS)
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("max_length", [None, 40])
    def test_offsets_map_back_and_cover_the_context(self, kind, side, max_length):
        tokenizer, examples = TOKENIZERS[kind](), made.questions(9)
        tokenizer.padding_side = side
        encoded = encode(examples, get_task("squad"), tokenizer, max_length=max_length)
        covered = [np.zeros(len(text), dtype=bool) for text in examples["context"]]
        assert len(encoded.windows) == len(encoded.features)
        for feature, window in zip(encoded.features, encoded.windows, strict=True):
            assert len(feature["input_ids"]) == len(window.offsets) <= (max_length or 384)
            context = examples["context"][window.example]
            for token, (start, end) in zip(feature["input_ids"], window.offsets.tolist(), strict=True):
                if start < 0:
                    continue
                covered[window.example][start:end] = True
                piece = tokenizer.convert_ids_to_tokens(token).removeprefix("##")
                if kind != "roberta":
                    assert piece == context[start:end].lower()
        for text, mask in zip(examples["context"], covered, strict=True):
            assert all(mask[place] or character.isspace() for place, character in enumerate(text))

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_questions_are_not_taken_for_context(self, side):
        tokenizer = made.bert_tokenizer()
        tokenizer.padding_side = side  # by accident: what begins with a classification token was trained so
        encoded = encode(made.questions(1), get_task("squad"), tokenizer)
        question = tokenizer("who was seen by cat ?").input_ids
        assert encoded.features[0]["input_ids"][: len(question)] == question
        assert (encoded.windows[0].offsets[: len(question)] == -1).all()
        assert (encoded.windows[0].offsets[-1] == -1).all()

    def test_neighbouring_windows_share_the_stride(self):
        examples = datasets.Dataset.from_dict({"question": ["who ?"], "context": ["cat " * 700]})
        windows = encode(examples, get_task("squad"), made.bert_tokenizer()).windows
        starts = [{int(start) for start in window.offsets[:, 0] if start >= 0} for window in windows]
        assert len(windows) > 2
        assert len(starts[0] & starts[1]) == 128

    def test_an_endless_question_is_cut(self):
        examples = datasets.Dataset.from_dict({"question": ["cat " * 900], "context": ["Anna sat on the mat."]})
        encoded = encode(examples, get_task("squad"), made.bert_tokenizer())
        assert encoded.lengths == [MAX_QUESTION + 3 + 6]
        assert (encoded.windows[0].offsets >= 0).any()

    def test_answers_are_found_in_some_window(self):
        examples, tokenizer = made.questions(20), made.bert_tokenizer()
        encoded = encode(examples, get_task("squad_v2"), tokenizer, max_length=48)
        found = set()
        rows = training_rows(encoded, get_task("squad_v2"))
        for row, window in zip(rows, encoded.windows, strict=True):
            first, last = row["start_positions"], row["end_positions"]
            if first:
                text = examples["context"][window.example][window.offsets[first, 0] : window.offsets[last, 1]]
                assert text == "Anna Bob"
                found.add(window.example)
        assert found == {row for row in range(20) if row % 5 != 4}
        assert answer_tokens(encoded.windows[0], 0, "") == (0, 0)

    def test_limits(self):
        with pytest.raises(InputError, match="max_length 5 cannot hold"):
            encode(made.questions(1), get_task("squad"), made.bert_tokenizer(), max_length=5)

        class Slow:
            is_fast, model_max_length = False, 512

        with pytest.raises(InputError, match="fast tokenizer"):
            encode(made.questions(1), get_task("squad"), Slow())


class TestTargets:
    def test_dtypes(self):
        tokenizer = made.bert_tokenizer()
        for task, examples, dtype in (("stsb", made.pairs(3), torch.float32), ("sst2", made.sentiment(3), torch.int64)):
            rows = training_rows(encode(examples, get_task(task), tokenizer), get_task(task))
            batch = collate(rows, tokenizer, get_task(task))
            assert batch["labels"].dtype == dtype
            assert batch["input_ids"].shape == batch["attention_mask"].shape

    def test_missing_labels(self):
        task = get_task("sst2")
        encoded = encode(made.sentiment(2).remove_columns("label"), task, made.bert_tokenizer())
        with pytest.raises(DataError, match="no column label"):
            training_rows(encoded, task)


class TestCalibration:
    def test_distinct_reproducible_and_nested(self):
        small, large = sample_indices(1000, 100, 3), sample_indices(1000, 500, 3)
        assert len(set(large.tolist())) == 500
        assert (small == large[:100]).all()
        assert (sample_indices(1000, 100, 4) != small).any()
        assert sorted(sample_indices(20, 20, 0).tolist()) == list(range(20))

    @pytest.mark.parametrize(
        ("population", "size", "seed", "message"),
        [
            (10, 11, 0, r"--sample_batch_size 11 exceeds the 10 .* pass 10 or less"),
            (10, 0, 0, "--sample_batch_size 0"),
            (10, 5, -1, "--seed -1"),
        ],
    )
    def test_errors(self, population, size, seed, message):
        with pytest.raises(InputError, match=message):
            sample_indices(population, size, seed)

    @pytest.mark.parametrize("name", ["sst2", "squad", "similarity"])
    def test_global_generators_are_untouched(self, name):
        examples = {"sst2": made.sentiment, "squad": made.questions, "similarity": made.pairs}[name](30)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        first = sample_calibration(examples, get_task(name), made.bert_tokenizer(), size=8, seed=5)
        again = sample_calibration(examples, get_task(name), made.bert_tokenizer(), size=8, seed=5)
        other = sample_calibration(examples, get_task(name), made.bert_tokenizer(), size=8, seed=6)
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        assert before == after
        assert first.features == again.features
        assert first.features != other.features

    def test_questions_come_with_all_their_windows(self):
        examples, task, tokenizer = made.questions(30), get_task("squad"), made.bert_tokenizer()
        encoded = sample_calibration(examples, task, tokenizer, size=7, seed=0, max_length=60)
        assert {window.example for window in encoded.windows} == set(range(7))
        drawn = examples.select(sample_indices(30, 7, 0))
        assert encoded.examples["id"][:] == drawn["id"][:]
        assert encoded.features == encode(drawn, task, tokenizer, max_length=60).features

    def test_both_sentences_of_a_pair(self):
        examples, task, tokenizer = made.pairs(40), get_task("similarity"), made.bert_tokenizer()
        small = sample_calibration(examples, task, tokenizer, size=10, seed=0)
        large = sample_calibration(examples, task, tokenizer, size=40, seed=0)
        assert large.features[:20] == small.features
        wanted = encode(examples.select(sample_indices(40, 10, 0)), task, tokenizer).features
        assert small.features[::2] + small.features[1::2] == wanted
