"""Language-modelling corpora: where their texts come from, and the windows that are cut from them."""

import json
import logging
import random
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks import make_samples
from shrinkformer.dataset import corpora
from shrinkformer.dataset.corpora import (
    calibration_split,
    calibration_windows,
    evaluation_windows,
    load_texts,
    read_own_text,
    require_different_files,
    windows_of,
)
from shrinkformer.dataset.corpus import CORPORA, get_corpus
from shrinkformer.dataset.loading import SAMPLES
from shrinkformer.errors import DataError, InputError

WIKITEXT, PTB, C4 = (CORPORA[name] for name in ("wikitext2", "ptb-new", "c4-new"))
END = 256


def decoder_tokenizer(model_max_length: int = 64) -> PreTrainedTokenizerFast:
    """One token per byte, and the end-of-text token in front, as OPT's tokenizer puts it."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters | {"</s>": END}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="</s>", eos_token="</s>", model_max_length=model_max_length
    )


TOKENIZER = decoder_tokenizer()


def text_of(window: torch.Tensor) -> str:
    return TOKENIZER.decode(window[window != END])


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the hub was asked for, in vain."""
    calls: list[tuple] = []

    def fail(*arguments, **options):
        calls.append((arguments, options))
        raise ConnectionError("no network\nin tests")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    return calls


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All three corpora, small; the words of a split stand in no other."""
    for split in ("validation", "test"):
        lines = [" \n", f" = {split} = \n", *(f" {split} line {row} , with <unk> é . \n" for row in range(30))]
        write(tmp_path / "wikitext2" / f"{split}.txt", "".join(lines))
    for split in ("train", "validation", "test"):
        write(tmp_path / "ptb" / f"{split}.txt", "".join(f" {split} sentence {row} \n" for row in range(40)))
    for split in ("train", "validation"):
        texts = [f"{split} document {row}:\n" + "words " * (3 * row) for row in range(12)]
        write(tmp_path / "c4" / f"{split}.jsonl", "\n".join(json.dumps({"text": text, "url": ""}) for text in texts))
    return tmp_path


class TestRecords:
    def test_they_are_gptqs(self):
        """IST-DASLab/gptq, datautils.py: get_wikitext2, get_ptb_new, get_c4_new."""
        assert list(CORPORA) == ["wikitext2", "ptb-new", "c4-new"]
        assert WIKITEXT.hub == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        assert [(c.joiner, c.column, c.calibration_splits[0], c.evaluation_split) for c in CORPORA.values()] == [
            ("\n\n", "text", "train", "test"),
            (" ", "sentence", "train", "test"),
            (" ", "text", "train", "validation"),
        ]
        assert [(c.evaluation_texts, c.evaluation_windows, c.window_per_text) for c in CORPORA.values()] == [
            (None, None, False),
            (None, None, False),
            (1100, 256, True),
        ]

    @pytest.mark.parametrize("corpus", CORPORA.values(), ids=list(CORPORA))
    def test_none_is_calibrated_on_what_it_is_evaluated_on(self, corpus):
        assert corpus.evaluation_split not in corpus.calibration_splits

    def test_an_unknown_name_gets_the_flag_and_the_choices(self):
        assert get_corpus("ptb-new") is PTB
        with pytest.raises(InputError, match=r"--task 'ptb' .* wikitext2, ptb-new, c4-new"):
            get_corpus("ptb")


class TestLoading:
    def test_wikitext_rows_are_the_hubs(self, data):
        with (data / "wikitext2" / "test.txt").open(encoding="utf-8") as file:  # as the hub's data set was made
            expected = [row if row.strip() else "" for row in file]
        texts = load_texts(WIKITEXT, "test", data_dir=data)
        assert texts == expected
        assert texts[:2] == ["", " = test = \n"]

    def test_ptb_rows_are_stripped(self, data):
        assert load_texts(PTB, "test", data_dir=data)[:2] == ["test sentence 0", "test sentence 1"]

    @pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
    def test_every_format_gives_the_same_texts(self, tmp_path, suffix):
        texts = ["one\ntwo ", "", " three é\t", "4"]
        examples, path = datasets.Dataset.from_dict({"text": texts}), tmp_path / "c4" / f"train{suffix}"
        path.parent.mkdir()
        if suffix == ".json":
            path.write_text(json.dumps(examples.to_list()), encoding="utf-8")
        else:
            (examples.to_parquet if suffix == ".parquet" else examples.to_json)(str(path))
        assert load_texts(C4, "train", data_dir=tmp_path) == texts

    def test_a_text_file_of_documents_has_one_per_line(self, tmp_path):
        write(tmp_path / "c4" / "train.txt", " one\u2028two \r\nthree")
        assert load_texts(C4, "train", data_dir=tmp_path) == [" one\u2028two ", "three"]

    def test_the_folder_comes_before_the_samples_and_those_before_the_hub(self, data, asked):
        assert load_texts(PTB, "test", data_dir=data, bundled=True)[0] == "test sentence 0"
        assert load_texts(PTB, "test", data_dir=None, bundled=True)[0].startswith("no it was n't black monday")
        assert not asked
        with pytest.raises(DataError):
            load_texts(PTB, "test", data_dir=None)
        assert asked

    @pytest.mark.parametrize(
        ("corpus", "split", "arguments", "file"),
        [
            (WIKITEXT, "train", ("Salesforce/wikitext", "wikitext-2-raw-v1"), None),
            (PTB, "test", ("parquet",), "ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/test/0000.parquet"),
            (C4, "train", ("json",), "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz"),
            (C4, "validation", ("json",), "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz"),
        ],
    )
    def test_the_hub_is_asked_for_gptqs_files(self, monkeypatch, corpus, split, arguments, file):
        def load(*given, **options):
            assert given == arguments
            assert options.pop("split") == split
            assert (file is None and not options) or options["data_files"][split].endswith(file)
            return datasets.Dataset.from_dict({corpus.column: ["a text"], "other": [1]})

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert load_texts(corpus, split, data_dir=None) == ["a text"]

    def test_nothing_found_is_one_line_with_the_ways_out(self, tmp_path):
        wanted = r"wikitext2/test.\{txt,parquet,json,jsonl\}"
        with pytest.raises(DataError, match=f"--data_dir is not given .*{wanted}, or --bundled_data") as caught:
            load_texts(WIKITEXT, "test", data_dir=None)
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match=f"--data_dir {tmp_path} has no such file .*no network.*{wanted}"):
            load_texts(WIKITEXT, "test", data_dir=tmp_path)
        with pytest.raises(DataError, match=f"nowhere is not a folder; it should hold {wanted}"):
            load_texts(WIKITEXT, "test", data_dir=tmp_path / "nowhere")

    def test_a_wrong_column_or_no_text_is_named(self, tmp_path):
        path = write(tmp_path / "ptb" / "test.json", json.dumps([{"text": "a"}]))
        with pytest.raises(DataError, match=r"test.json has no column sentence \(found: text\)"):
            load_texts(PTB, "test", data_dir=tmp_path)
        for rows in ([{"sentence": 1}], [{"sentence": ""}]):
            write(path, json.dumps(rows))
            with pytest.raises(DataError, match=r"column sentence holds (no texts|1, which is not a text)"):
                load_texts(PTB, "test", data_dir=tmp_path)

    def test_calibration_takes_the_first_split_that_is_there(self, data, tmp_path):
        assert calibration_split(WIKITEXT, data) == "validation"
        assert [calibration_split(corpus, data) for corpus in (PTB, C4)] == ["train", "train"]
        write(tmp_path / "wikitext2" / "train.txt", "text")
        assert calibration_split(WIKITEXT, data) == "train"
        assert calibration_split(WIKITEXT, None, bundled=True) == "validation"
        assert calibration_split(WIKITEXT, None) == "train"  # the hub has it


class TestCalibrationWindows:
    @pytest.mark.parametrize("corpus", [WIKITEXT, PTB])
    def test_windows_are_stretches_of_the_joined_text(self, data, corpus):
        windows = calibration_windows(corpus, TOKENIZER, length=50, size=20, seed=0, data_dir=data)
        assert windows.shape == (20, 50)
        assert windows.dtype == torch.int64
        split = calibration_split(corpus, data)
        ids = TOKENIZER(corpus.joiner.join(load_texts(corpus, split, data_dir=data)), verbose=False)["input_ids"]
        stretches = {tuple(ids[start : start + 50]) for start in range(len(ids) - 50)}
        assert {tuple(window.tolist()) for window in windows} <= stretches
        assert len({tuple(window.tolist()) for window in windows}) > 10

    def test_c4_windows_lie_in_one_long_document_each(self, data):
        texts = load_texts(C4, "train", data_dir=data)
        windows = calibration_windows(C4, TOKENIZER, length=100, size=6, seed=0, data_dir=data)
        homes = [[row for row, text in enumerate(texts) if text_of(window) in text] for window in windows]
        long = [row for row, text in enumerate(texts) if len(TOKENIZER(text, verbose=False)["input_ids"]) > 100]
        assert all(home and set(home) <= set(long) for home in homes)

    def test_c4_documents_come_again_only_when_all_were_there(self, tmp_path):
        texts = [letter * 40 for letter in "abcde"] + ["short"] * 50
        write(tmp_path / "c4" / "train.json", json.dumps([{"text": text} for text in texts]))
        windows = calibration_windows(C4, TOKENIZER, length=20, size=13, seed=3, data_dir=tmp_path)
        letters = [text_of(window)[-1] for window in windows]
        assert sorted(letters[:5]) == sorted(letters[5:10]) == list("abcde")
        assert len(windows) == 13

    @pytest.mark.parametrize("corpus", CORPORA.values(), ids=list(CORPORA))
    def test_they_depend_on_the_seed_and_leave_global_generators_alone(self, data, corpus):
        def draw(seed):
            return calibration_windows(corpus, TOKENIZER, length=30, size=8, seed=seed, data_dir=data)

        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        first = draw(7)
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        random.seed(2), np.random.seed(2), torch.manual_seed(2)
        assert draw(7).equal(first)
        assert not draw(8).equal(first)

    def test_every_start_that_gptq_draws_is_drawn(self):
        text = "0123456789"  # 11 tokens with the one in front
        windows = calibration_windows(text, TOKENIZER, length=4, size=200, seed=0)
        starts = {window.tolist()[0] for window in windows}
        assert starts == set(TOKENIZER(text)["input_ids"][: 11 - 4])  # random.randint(0, tokens - length - 1)

    def test_a_text_of_the_users_own_is_drawn_from(self):
        text = "All of this text is the user's own; nothing else is read."
        for window in calibration_windows(text, TOKENIZER, length=20, size=5, seed=0):
            assert text_of(window) in text

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 0}, "--sample_batch_size 0"),
            ({"seed": -1}, "--seed -1"),
            ({"length": 1}, "windows of 1 tokens"),
        ],
    )
    def test_values_out_of_range_are_named(self, options, message):
        with pytest.raises(InputError, match=message):
            calibration_windows("some text", TOKENIZER, **({"length": 4, "size": 2, "seed": 0} | options))

    def test_too_short_a_text_is_named(self, data):
        with pytest.raises(DataError, match="ptb-new train has no text of more than 5000 tokens"):
            calibration_windows(PTB, TOKENIZER, length=5000, size=1, seed=0, data_dir=data)
        with pytest.raises(DataError, match="c4-new train has no text of more than 500 tokens"):
            calibration_windows(C4, TOKENIZER, length=500, size=1, seed=0, data_dir=data)
        with pytest.raises(DataError, match="the calibration text has no"):
            calibration_windows("abc", TOKENIZER, length=4, size=1, seed=0)


class TestEvaluationWindows:
    @pytest.mark.parametrize("corpus", [WIKITEXT, PTB])
    def test_they_are_gptqs(self, data, corpus):
        """Opt.py: nsamples = numel // seqlen; window i is testenc[:, i * seqlen : (i + 1) * seqlen]."""
        joined = corpus.joiner.join(load_texts(corpus, "test", data_dir=data))
        ids = TOKENIZER(joined, return_tensors="pt", verbose=False).input_ids
        windows = evaluation_windows(corpus, TOKENIZER, length=32, data_dir=data)
        assert windows.dtype == torch.int64
        assert len(windows) == ids.numel() // 32
        for index, window in enumerate(windows):
            assert window.equal(ids[0, index * 32 : (index + 1) * 32])

    def test_c4_stops_after_1100_texts_and_256_windows(self, tmp_path):
        texts = [f"text {row}" for row in range(1300)]
        write(tmp_path / "c4" / "validation.json", json.dumps([{"text": text} for text in texts]))
        ids = TOKENIZER(" ".join(texts[:1100]), verbose=False)["input_ids"]
        for length, windows in ((16, 256), (64, len(ids) // 64)):
            found = evaluation_windows(C4, TOKENIZER, length=length, data_dir=tmp_path)
            assert found.flatten().tolist() == ids[: windows * length]

    def test_less_than_one_window_is_an_error(self, data):
        with pytest.raises(DataError, match="ptb-new test has 670 tokens, less than one window of 671"):
            evaluation_windows(PTB, TOKENIZER, length=671, data_dir=data)
        assert evaluation_windows(PTB, TOKENIZER, length=670, data_dir=data).shape == (1, 670)

    @given(text=st.text(min_size=1, max_size=80), length=st.integers(2, 20))
    def test_windows_lose_nothing_but_the_rest(self, text, length):
        ids = TOKENIZER(text, verbose=False)["input_ids"]
        if len(ids) < length:
            with pytest.raises(DataError, match=f"{len(ids)} tokens"):
                windows_of(text, TOKENIZER, length)
        else:
            assert windows_of(text, TOKENIZER, length).flatten().tolist() == ids[: len(ids) // length * length]

    @pytest.mark.parametrize("corpus", CORPORA.values(), ids=list(CORPORA))
    def test_nothing_that_is_evaluated_was_calibrated_on(self, data, corpus):
        seen = calibration_windows(corpus, TOKENIZER, length=40, size=50, seed=0, data_dir=data)
        calibrated = " ".join(text_of(window) for window in seen)
        judged = " ".join(text_of(window) for window in evaluation_windows(corpus, TOKENIZER, length=40, data_dir=data))
        assert corpus.evaluation_split in judged
        assert corpus.evaluation_split not in calibrated
        assert calibration_split(corpus, data) in calibrated

    def test_a_text_longer_than_the_model_takes_gives_no_warning(self, data):
        heard: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = heard.append
        logging.getLogger("transformers").addHandler(handler)
        try:
            tokenizer = decoder_tokenizer(model_max_length=16)
            evaluation_windows(PTB, tokenizer, length=8, data_dir=data)
            for corpus in CORPORA.values():
                calibration_windows(corpus, tokenizer, length=8, size=2, seed=0, data_dir=data)
            assert not heard
            tokenizer("this would be heard if it were not asked to be quiet")
            assert "longer than the specified maximum" in heard[0].getMessage()
        finally:
            logging.getLogger("transformers").removeHandler(handler)


class TestOwnFiles:
    def test_a_text_is_read_as_it_stands(self, tmp_path):
        path = tmp_path / "own.txt"
        path.write_bytes("\ufeffEin Text,\r\n  größer\n".encode())
        assert read_own_text(path) == "Ein Text,\n  größer\n"

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"caf\xe9", r"is not UTF-8 text \(byte 3\)"), (b" \n", "is empty"), (None, "No such file")],
    )
    def test_what_cannot_be_read_is_named(self, tmp_path, content, message):
        path = tmp_path / "own.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=f"own.txt .*{message}"):
            read_own_text(path)
        with pytest.raises(DataError, match="cannot be read"):
            read_own_text(tmp_path)

    def test_calibration_and_evaluation_must_differ(self, tmp_path):
        one, copy, other = (write(tmp_path / name, text) for name, text in (("1", "a b"), ("2", "a b"), ("3", "a c")))
        link = tmp_path / "link"
        link.symlink_to(one)
        require_different_files(one, other)
        for same in (one, copy, link):
            with pytest.raises(InputError, match=r"--calibration_file .*1 and --evaluation_file .* hold the same text"):
                require_different_files(one, same)


class TestSamples:
    @pytest.mark.parametrize("corpus", CORPORA.values(), ids=list(CORPORA))
    def test_every_corpus_can_be_tried_without_data(self, corpus, asked):
        calibrated = load_texts(corpus, calibration_split(corpus, None, True), data_dir=None, bundled=True)
        judged = load_texts(corpus, corpus.evaluation_split, data_dir=None, bundled=True)
        assert not asked
        sizes = [sum(len(text.encode()) for text in texts) for texts in (calibrated, judged)]
        assert 590_000 < sizes[0] <= 600_000
        assert 390_000 < sizes[1] <= 400_000

    @pytest.mark.parametrize("corpus", [WIKITEXT, C4])
    def test_no_text_is_in_both_splits(self, corpus):
        splits = (calibration_split(corpus, None, True), corpus.evaluation_split)
        first, second = ({t for t in load_texts(corpus, s, data_dir=None, bundled=True) if len(t) > 60} for s in splits)
        assert min(len(first), len(second)) > 50
        assert not first & second

    def test_no_two_sentences_of_ptb_follow_each_other_in_both_splits(self):
        """Single ones do: the boilerplate under the Journal's tables of interest rates, in the whole corpus too."""
        texts = [load_texts(PTB, split, data_dir=None, bundled=True) for split in ("train", "test")]
        first, second = ({pair for pair in pairwise(t) if len(pair[0] + pair[1]) > 120} for t in texts)
        assert len(first & second) <= 2
        assert len(set(texts[0]) & set(texts[1])) < 0.02 * len(texts[1])

    def test_they_are_small(self):
        files = [SAMPLES / f"{c.folder}_{s}.parquet" for c in CORPORA.values() for s in make_samples.EXCERPTS[c.name]]
        assert sum(file.stat().st_size for file in files) < 1_500_000

    def test_the_longest_documents_are_kept_for_calibration_and_the_first_texts_else(self):
        texts = ["aa", "bbbbbb", "c", "dddd", "eeeee"]
        assert make_samples.excerpt(C4, "train", texts, 11) == ["bbbbbb", "eeeee"]
        assert make_samples.excerpt(C4, "validation", texts, 11) == ["aa", "bbbbbb", "c"]
        assert make_samples.excerpt(PTB, "train", texts, 7) == ["aa"]

    def test_they_are_cut_from_the_data_and_read_back(self, data, tmp_path, monkeypatch):
        written = make_samples.cut_corpora(data, tmp_path / "cut")
        assert sorted(path.name for path in written) == [
            "c4_train.parquet",
            "c4_validation.parquet",
            "ptb_test.parquet",
            "ptb_train.parquet",
            "wikitext2_test.parquet",
            "wikitext2_validation.parquet",
        ]
        monkeypatch.setattr(corpora, "SAMPLES", tmp_path / "cut")
        for corpus in CORPORA.values():
            split = corpus.evaluation_split
            assert load_texts(corpus, split, data_dir=None, bundled=True) == load_texts(corpus, split, data_dir=data)
