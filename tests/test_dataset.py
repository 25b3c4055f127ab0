import json
from pathlib import Path

import dataset_fixtures as made
import datasets
import pytest

from shrinkformer.dataset.calibration import sample_calibration
from shrinkformer.dataset.loading import SAMPLES, evaluation_splits, find_split, load_examples, load_split
from shrinkformer.dataset.tasks import TASKS, get_task
from shrinkformer.errors import DataError, InputError

SUFFIXES = ("parquet", "json", "jsonl", "csv")


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no network\nin tests")

    monkeypatch.setattr(datasets, "load_dataset", fail)


def write(examples: datasets.Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(examples.to_list()), encoding="utf-8")
    else:
        {".parquet": examples.to_parquet, ".jsonl": examples.to_json, ".csv": examples.to_csv}[path.suffix](str(path))
    return path


class TestTasks:
    def test_asked_for_tasks_are_there(self):
        wanted = "mnli qqp qnli sst2 stsb mrpc cola rte squad squad_v2 similarity"
        assert set(TASKS) == set(wanted.split())

    def test_unknown_task_names_flag_value_and_choices(self):
        with pytest.raises(InputError, match=r"--task_name 'qpq' .*qqp.*squad_v2"):
            get_task("qpq")

    def test_lengths_metrics_and_splits(self):
        assert (get_task("squad").max_length, get_task("sst2").max_length, get_task("qqp").max_length) == (384, 64, 128)
        assert get_task("squad").metrics == ("f1", "exact_match")
        assert get_task("qqp").metrics == ("accuracy", "f1")
        assert get_task("mnli").evaluation_splits == ("validation_matched", "validation_mismatched")
        assert get_task("qqp").is_pair
        assert not get_task("similarity").is_pair


class TestLoading:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_every_format_gives_the_same_rows(self, tmp_path, suffix):
        examples = made.sentiment(7)
        write(examples, tmp_path / "glue" / "sst2" / f"validation.{suffix}")
        loaded = load_split(get_task("sst2"), "validation", data_dir=tmp_path)
        assert loaded.to_list() == examples.to_list()

    @pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
    def test_squad_answers_survive(self, tmp_path, suffix):
        examples = made.questions(6)
        write(examples, tmp_path / "squad" / f"train.{suffix}")
        assert load_split(get_task("squad"), "train", data_dir=tmp_path).to_list() == examples.to_list()

    def test_published_squad_json(self, tmp_path):
        questions = [{"id": "1", "question": "who ?", "answers": [{"text": "Anna", "answer_start": 0}]}]
        article = {"title": "t", "paragraphs": [{"context": "Anna sat.", "qas": questions}]}
        (tmp_path / "squad").mkdir()
        (tmp_path / "squad" / "train.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
        row = load_split(get_task("squad"), "train", data_dir=tmp_path)[0]
        assert row["context"] == "Anna sat."
        assert row["answers"] == {"text": ["Anna"], "answer_start": [0]}

    def test_numbers_as_texts_in_csv(self, tmp_path):
        path = tmp_path / "glue" / "sst2" / "train.csv"
        path.parent.mkdir(parents=True)
        path.write_text('sentence,label\n007,0\n"two\nlines",1\n')
        assert load_split(get_task("sst2"), "train", data_dir=tmp_path)["sentence"][:] == ["007", "two\nlines"]

    def test_find_split_agrees_with_load_split(self, tmp_path):
        task = get_task("sst2")
        assert find_split(task, "train", tmp_path) is None
        path = write(made.sentiment(3), tmp_path / "glue" / "sst2" / "train.jsonl")
        assert find_split(task, "train", tmp_path) == path
        with pytest.raises(DataError, match=r"--data_dir .*nowhere is not a folder"):
            find_split(task, "train", tmp_path / "nowhere")

    def test_mnli_falls_back_to_the_split_that_is_there(self, tmp_path):
        task = get_task("mnli")
        examples = datasets.Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [2]})
        path = write(examples, tmp_path / "glue" / "mnli" / "validation_mismatched.parquet")
        assert evaluation_splits(task, tmp_path) == ("validation_mismatched",)
        assert find_split(task, "validation", tmp_path) == path
        assert load_split(task, "validation", data_dir=tmp_path)["label"][:] == [2]
        with pytest.raises(DataError, match=r"validation_matched.*only validation_mismatched"):
            load_split(task, "validation_matched", data_dir=tmp_path)
        assert evaluation_splits(task, None) == task.evaluation_splits

    def test_nothing_found_is_one_clear_line(self, tmp_path):
        with pytest.raises(DataError) as caught:
            load_split(get_task("qqp"), "train", data_dir=tmp_path)
        message = str(caught.value)
        assert "\n" not in message
        for part in ("--data_dir", "glue/qqp/train.{parquet,json,jsonl,csv}", "nyu-mll/glue (qqp)", "no network"):
            assert part in message
        with pytest.raises(DataError, match="--data_dir is not given"):
            load_split(get_task("qqp"), "train", data_dir=None)

    def test_hub_is_asked_for_the_right_data_set(self, monkeypatch):
        asked = []

        def answer(*arguments, split):
            asked.append((*arguments, split))
            return datasets.Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [0]})

        monkeypatch.setattr(datasets, "load_dataset", answer)
        assert len(load_split(get_task("mnli"), "validation", data_dir=None)) == 1
        assert asked == [("nyu-mll/glue", "mnli", "validation_matched")]

    def test_missing_columns_are_named(self, tmp_path):
        path = write(made.pairs(3), tmp_path / "glue" / "qqp" / "train.parquet")
        with pytest.raises(DataError) as caught:
            load_split(get_task("qqp"), "train", data_dir=tmp_path)
        message = str(caught.value)
        assert str(path) in message
        assert "question1, question2" in message
        assert "found: sentence1, sentence2, label" in message

    @pytest.mark.parametrize(("label", "task"), [(2, "sst2"), (-1, "sst2"), ("good", "sst2"), (None, "sst2")])
    def test_labels_that_do_not_fit(self, tmp_path, label, task):
        examples = datasets.Dataset.from_dict({"sentence": ["a"], "label": [label]})
        write(examples, tmp_path / "glue" / task / "train.json")
        with pytest.raises(DataError, match=r"row 0.*needs a class 0 to 1"):
            load_split(get_task(task), "train", data_dir=tmp_path)

    def test_score_that_is_not_a_number(self, tmp_path):
        examples = datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [float("nan")]})
        write(examples, tmp_path / "glue" / "stsb" / "train.parquet")
        with pytest.raises(DataError, match="needs a number"):
            load_split(get_task("stsb"), "train", data_dir=tmp_path)

    def test_text_that_is_none(self, tmp_path):
        examples = datasets.Dataset.from_dict({"sentence": ["a", None], "label": [0, 1]})
        write(examples, tmp_path / "glue" / "sst2" / "train.parquet")
        with pytest.raises(DataError, match=r"row 1: column sentence holds None"):
            load_split(get_task("sst2"), "train", data_dir=tmp_path)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("content", [b"", b"\x00\xff{{"])
    def test_empty_and_broken_files(self, tmp_path, suffix, content):
        path = tmp_path / f"mine.{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path.name}.*(empty|cannot be read|no column|not UTF-8)"):
            load_examples(path, get_task("sst2"))

    def test_files_with_a_header_only(self, tmp_path):
        path = tmp_path / "mine.csv"
        path.write_text("sentence,label\n")
        with pytest.raises(DataError, match="holds no examples"):
            load_examples(path, get_task("sst2"))


class TestOwnExamples:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_labels_are_not_needed(self, tmp_path, suffix):
        path = write(made.sentiment(4).remove_columns("label"), tmp_path / f"mine.{suffix}")
        loaded = load_examples(path, get_task("sst2"))
        assert loaded.column_names == ["sentence"]
        encoded = sample_calibration(loaded, get_task("sst2"), made.bert_tokenizer(), size=3, seed=0)
        assert encoded.labels is None
        assert len(encoded.features) == 3

    def test_lines(self, tmp_path):
        path = tmp_path / "mine.txt"
        path.write_text("the cat sat\r\n\n  a dog ran \n", encoding="utf-8")
        assert load_examples(path, get_task("sst2"))["sentence"][:] == ["the cat sat", "a dog ran"]
        assert load_examples(path, get_task("similarity"))["sentence1"][:] == ["the cat sat", "a dog ran"]

    def test_lines_of_pairs(self, tmp_path):
        path = tmp_path / "mine.txt"
        path.write_text("who ?\tthe cat\nwhere ?\tthe mat\n")
        assert load_examples(path, get_task("qnli")).to_list()[1] == {"question": "where ?", "sentence": "the mat"}
        assert load_examples(path, get_task("squad"))["context"][:] == ["the cat", "the mat"]
        path.write_text("who ?\tthe cat\nwhere ? the mat\n")
        with pytest.raises(DataError, match="line 2: 1 tab-separated texts where 2 are needed"):
            load_examples(path, get_task("qnli"))

    def test_sentence_encoder_reads_one_column(self, tmp_path):
        path = write(made.pairs(5).remove_columns(["sentence1", "label"]), tmp_path / "mine.jsonl")
        loaded = load_examples(path, get_task("similarity"))
        encoded = sample_calibration(loaded, get_task("similarity"), made.bert_tokenizer(), size=5, seed=0)
        assert len(encoded.features) == 5

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("gone.txt", None, "does not exist"),
            ("empty.txt", b" \n\n", "is empty"),
            ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
            ("mine.docx", b"x", r"'.docx' are not read; use .parquet"),
            ("other.jsonl", b'{"text": "a"}\n', r"no column sentence \(found: text\)"),
        ],
    )
    def test_clear_errors(self, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            load_examples(tmp_path / name, get_task("sst2"))
        assert name in str(caught.value)


class TestSamples:
    def test_bundled_only_if_asked(self):
        task = get_task("similarity")
        assert find_split(task, "validation", None) is None
        assert len(load_split(task, "validation", data_dir=None, bundled=True)) == 1500
        assert len(load_split(get_task("stsb"), "train", data_dir=None, bundled=True)) == 600

    def test_a_folder_of_the_user_comes_first(self, tmp_path):
        path = write(made.pairs(3), tmp_path / "glue" / "stsb" / "train.parquet")
        assert find_split(get_task("stsb"), "train", tmp_path, bundled=True) == path

    def test_small(self):
        assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < 1_200_000
