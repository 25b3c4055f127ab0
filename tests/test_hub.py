"""The hub: models from it, checkpoints to it and back, against a local server that speaks its protocol."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch

import shrinkformer
from shrinkformer.commands.main import main
from shrinkformer.errors import CheckpointError
from shrinkformer.utils.hub import folder_of
from shrinkformer.utils.upload import card_on_hub, files_to_push
from tests.conftest import ROOT, WORDS, build_model, build_tokenizer, make_batches
from tests.hub_server import TOKEN, Hub, serve

NAME = "tester/tiny-bert"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint with a card."""
    target = tmp_path_factory.mktemp("saved") / "small"
    pruned = shrinkformer.prune_model(build_model(), make_batches([9] * 16, batch_size=8), mu=0.5, method="stat")
    card = f'---\ntags:\n- shrinkformer\n---\n# Small\n\nmodel = shrinkformer.load("{target}")\n'
    return shrinkformer.save(pruned.model, target, plan=pruned.plan, tokenizer=build_tokenizer(), card=card)


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def python(hub: Hub, where: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process that knows the server as the hub; libraries read where it is once, when they are imported."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(where / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=where,
        env=known | given | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_model_comes_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    data = tmp_path / "data" / "glue" / "sst2"
    data.mkdir(parents=True)
    table = {
        "sentence": [f"{word} is {other}" for word in WORDS for other in WORDS[:3]],
        "label": [0, 1, 1] * len(WORDS),
    }
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(table).to_parquet(data / f"{split}.parquet")
    source = tmp_path / "source"
    build_model().save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n# Source\n")
    hub.add(NAME, {file.name: file.read_bytes() for file in source.iterdir()})
    flags = ["--model_name", NAME, "--task_name", "sst2", "--data_dir", str(tmp_path / "data"), "--mu", "0.5"]
    flags += ["--sample_batch_size", "64", "--search_seconds", "2", "--push_to_hub", "tester/small", "--private"]
    done = python(hub, tmp_path, str(ROOT / "prune_bert.py"), *flags, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "output/tester/tiny-bert/sst2.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["model_name"] == NAME
    assert record["method"] == "shrink"  # the default
    assert record["ratio"]["macs"] <= 0.5
    saved = tmp_path / "output/tester/tiny-bert/sst2-mu0.5"
    pushed = hub.repositories["tester/small"]
    assert pushed.private
    assert pushed.files()["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    card = (saved / "README.md").read_text()
    assert f"base_model: {NAME}" in card
    assert "license: mit" in card
    assert 'shrinkformer.load("tester/small")' in pushed.files()["README.md"].decode()


OURS = """
import json, shrinkformer, torch, huggingface_hub
from shrinkformer.commands.main import main
from shrinkformer.errors import ShrinkformerError

folder, token, said = {folder!r}, {token!r}, {{}}
tokens = torch.arange(10)[None]
here = shrinkformer.load(folder)(tokens).logits
torch.save(here, "logits.pt")

def attempt(name, call):
    try:
        said[name] = call()
    except ShrinkformerError as error:
        said[name] = f"{{type(error).__name__}}: {{error}}"

push, load = shrinkformer.push_to_hub, shrinkformer.load
for revision in (None, "v1"):
    attempt(f"push {{revision}}", lambda: push(folder, "tester/small", private=True, revision=revision, token=token))
    attempt(
        f"load {{revision}}",
        lambda: torch.equal(here, load("tester/small", revision=revision, token=token)(tokens).logits),
    )
load(folder).push_to_hub("tester/by-transformers", token=token)
attempt("secret", lambda: load("tester/secret"))
attempt("missing", lambda: load("tester/missing"))
attempt("revision", lambda: load("tester/public", revision="v9"))
attempt("empty", lambda: load("tester/public"))
attempt("no token", lambda: push(folder, "tester/new"))
attempt("no name", lambda: push(folder, "a/b/c", token=token))
attempt("wrong token", lambda: push(folder, "tester/new", token="wrong"))
attempt("public", lambda: push(folder, "tester/public", private=True, token=token))
attempt("refused", lambda: push(folder, "tester/broken", token=token))
said["command without token"] = main(["push", folder, "tester/old"])
huggingface_hub.get_token = lambda: token
import huggingface_hub.utils._headers
huggingface_hub.utils._headers.get_token = lambda: token
said["command"] = main(["push", folder, "tester/old", "--message", "new"])
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
said["command without hub"] = main(["push", folder, "tester/old"])
json.dump(said, open("said.json", "w"))
"""

WITHOUT_US = """
import sys
sys.modules["shrinkformer"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("tester/small", trust_remote_code=True)
assert AutoTokenizer.from_pretrained("tester/small")("the cat").input_ids
assert torch.equal(torch.load("logits.pt"), model(torch.arange(10)[None]).logits)
model.save_pretrained("again")
model = AutoModelForSequenceClassification.from_pretrained("tester/by-transformers", trust_remote_code=True)
assert torch.equal(torch.load("logits.pt"), model(torch.arange(10)[None]).logits)
"""


def test_there_and_back(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Push, load and fail in one process, because each takes seconds to start."""
    hub.add("tester/secret", {"config.json": b"{}"}, private=True)
    hub.add("tester/public", {"README.md": b"# Theirs"})
    hub.add("tester/old", {"model-00001-of-00002.safetensors": b"old", "model.onnx": b"old", "LICENSE": b"mine"})
    hub.refuses = "broken/preupload"
    done = python(hub, tmp_path, "-c", OURS.format(folder=str(folder), token=TOKEN))
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())

    for revision in (None, "v1"):
        assert said[f"push {revision}"] == f"{hub.endpoint}/tester/small"
        assert said[f"load {revision}"] is True  # equal to the last bit
    names = {file.name for file in folder.iterdir()}
    small = hub.repositories["tester/small"]
    assert small.private
    assert set(small.files()) == set(small.files("v1")) == {".gitattributes", *names}
    assert b'shrinkformer.load("tester/small")' in small.files()["README.md"]
    assert str(folder) in (folder / "README.md").read_text()  # what is here stays as it is
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert "config.json" in fetched
    assert "pruned_modeling.py" not in fetched  # the package runs no code from there

    for name, beginning in {
        "secret": "CheckpointError: tester/secret is not a folder here, and the hub has no such repository, or it is "
        "private: pass token=",
        "missing": "CheckpointError: tester/missing is not a folder here, and the hub has no such repository",
        "revision": "CheckpointError: tester/public: the hub has no such revision",
        "empty": "CheckpointError: tester/public has no config.json",
        "no token": "InputError: push_to_hub tester/new: no token of the hub is here; pass token=",
        "no name": "InputError: push_to_hub 'a/b/c': it is no name of a repository",
        "wrong token": "HubError: tester/new: the hub refuses this token (HTTP 401)",
        "public": "HubError: tester/public is there already and public",
        "refused": "HubError: tester/broken: the hub answered with HTTP 507, the disk is full",
    }.items():
        assert said[name].startswith(beginning), said[name]
        assert "\n" not in said[name]
    assert set(hub.repositories["tester/public"].files()) == {"README.md"}
    assert "tester/new" not in hub.repositories

    assert (said["command without token"], said["command"], said["command without hub"]) == (2, 0, 1)
    old = hub.repositories["tester/old"]
    assert set(old.files()) == {"LICENSE", *names}  # weights of another layout would be found first
    assert old.messages == ["initial commit", "new"]
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert [line.partition(": error: ")[0] for line in errors] == ["shrinkformer push"] * 2
    assert "no token of the hub is here" in errors[0]
    assert "tester/old: the hub cannot be reached" in errors[1]

    theirs = set(hub.repositories["tester/by-transformers"].files())
    assert theirs >= {"config.json", "model.safetensors", "pruned_modeling.py", "shrinkformer_plan.json"}
    done = python(hub, tmp_path, "-c", WITHOUT_US, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "other"))
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not [name for name in again["auto_map"].values() if "--" in name]  # code of the folder, not of the hub
    assert (tmp_path / "again" / "pruned_modeling.py").is_file()


def test_offline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(folder), "tester/small"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shrinkformer push: error: ")
    assert line.endswith("HF_HUB_OFFLINE=1 forbids to ask the hub; unset it.")


class TestWhatIsPushed:
    def test_only_what_belongs_to_a_checkpoint(self, folder: Path, tmp_path: Path) -> None:
        mine = copied(folder, tmp_path / "mine")
        for name in (".env", ".README.md.x1", "optimizer.pt", "old.resume/block.safetensors", "1_Pooling/config.json"):
            (mine / name).parent.mkdir(exist_ok=True)
            (mine / name).write_text("{}")
        assert set(files_to_push(mine)) == {*(file.name for file in folder.iterdir()), "1_Pooling/config.json"}

    def test_links_to_elsewhere(self, folder: Path, tmp_path: Path) -> None:
        mine = copied(folder, tmp_path / "mine")
        (tmp_path / "secret.txt").write_text("secret")
        (mine / "vocab.txt").symlink_to("tokenizer.json")
        assert "vocab.txt" in files_to_push(mine)
        (mine / "merges.txt").symlink_to(tmp_path / "secret.txt")
        with pytest.raises(CheckpointError, match=r"merges\.txt is a link to outside of the folder"):
            files_to_push(mine)
        (mine / "merges.txt").unlink()
        (mine / "more").symlink_to(tmp_path, target_is_directory=True)
        with pytest.raises(CheckpointError, match="more is a link to a folder"):
            files_to_push(mine)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"config.json": None}, "has no config.json"),
            ({"config.json": "{"}, "cannot be read as JSON"),
            ({"config.json": "{}"}, "names no model_type"),
            ({"model.safetensors": None}, "has no weights"),
            ({"model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'}, "names gone.safetensors"),
        ],
    )
    def test_what_is_no_checkpoint(
        self,
        folder: Path,
        tmp_path: Path,
        change: dict[str, str | None],
        said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        mine = copied(folder, tmp_path / "mine")
        for name, text in change.items():
            (mine / name).unlink(missing_ok=True)
            if text is not None:
                (mine / name).write_text(text)
        assert main(["push", str(mine), "tester/small"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line

    def test_examples_of_the_card(self) -> None:
        text = 'import onnxruntime\nsession = onnxruntime.InferenceSession("out/a/model.onnx")\n'
        assert card_on_hub(text, "me/a") == (
            "import onnxruntime\nfrom huggingface_hub import snapshot_download\n"
            'session = onnxruntime.InferenceSession(snapshot_download("me/a") + "/model.onnx")\n'
        )
        other = '# Theirs\nAutoModel.from_pretrained("somewhere")\n'
        assert card_on_hub(other, "me/a") == other


def test_names_that_are_no_folders(tmp_path: Path) -> None:
    assert folder_of(tmp_path / "nothing") == tmp_path / "nothing"
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE=1 forbids"):
        shrinkformer.load("tester/never-fetched")


def test_a_folder_comes_before_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tester").mkdir()
    copied(folder, tmp_path / "tester" / "small")
    tokens = torch.arange(8)[None]
    assert torch.equal(shrinkformer.load("tester/small")(tokens).logits, shrinkformer.load(folder)(tokens).logits)
