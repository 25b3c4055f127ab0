"""docs/hub.md: its blocks run in the order in which they stand, against the hub for tests."""

import json
import re
from pathlib import Path

import datasets
import pytest

from tests.conftest import ROOT, WORDS, build_model, build_tokenizer
from tests.hub_server import TOKEN, serve
from tests.test_hub import python

RUN = """
import importlib.util, json, shlex
from shrinkformer.commands.main import main
space = {}
for language, block in json.load(open("blocks.json")):
    if language == "python":
        if "sentence_transformers" not in block or importlib.util.find_spec("sentence_transformers"):
            exec(block, space)
        continue
    for line in block.splitlines():
        command, *flags = shlex.split(line)
        assert command == "shrinkformer", line
        if flags[0] == "prune":
            flags += ["--method", "stat", "--sample_batch_size", "16"]  # for speed
        missing = "tensorboard" in flags and importlib.util.find_spec("tensorboard") is None
        assert main(flags) == (2 if missing else 0), line
tokens = space["tokenizer"]("the man sees a dog", return_tensors="pt")
here = space["shrinkformer"].load("output/checkpoint/sst2-mu0.5").eval()
assert (here(**tokens).logits == space["model"](**tokens).logits).all()
if "embeddings" in space:
    assert space["embeddings"].shape == (2, 32)
"""


def test_every_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/hub.md").read_text(), re.DOTALL)
    assert [language for language, _ in blocks].count("bash") == 4
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    for name, head in (("checkpoint", "ForSequenceClassification"), ("encoder", "Model")):
        build_model(head=head).save_pretrained(tmp_path / "path/to" / name)
        build_tokenizer().save_pretrained(tmp_path / "path/to" / name)
    texts = [f"{word} {other}" for word in WORDS for other in WORDS[:3]]
    scores = [float(index % 5) for index in range(len(texts))]
    tables = {
        "sst2": {"sentence": texts, "label": [index % 2 for index in range(len(texts))]},
        "stsb": {"sentence1": texts, "sentence2": texts[::-1], "label": scores},
    }
    for name, table in tables.items():
        (tmp_path / "data/glue" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"data/glue/{name}/{split}.parquet")
    with serve() as hub:
        done = python(hub, tmp_path, "-c", RUN, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
        smaller = hub.repositories["user/smaller"]
        assert smaller.private
        assert set(smaller.branches) == {"main", "v1"}


@pytest.mark.parametrize("page", ["README.md", "docs/checkpoint.md"])
def test_others_lead_to_it(page: str) -> None:
    assert "hub.md" in (ROOT / page).read_text()
