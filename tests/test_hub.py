"""The hub path, against a small local server that speaks as much of the hub's protocol as a download needs."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from tests.conftest import ROOT, WORDS, build_model, build_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PREFIXES = tuple(f"/tester/tiny-bert/resolve/{revision}/" for revision in ("main", COMMIT))


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of one folder as the repository ``tester/tiny-bert``."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        prefix = next((p for p in PREFIXES if path.startswith(p)), "/")
        file = self.folder / path.removeprefix(prefix)
        if path.startswith("/api/"):
            listing = [{"type": "file", "path": entry.name, "size": 1, "oid": "0"} for entry in self.folder.iterdir()]
            siblings = [{"rfilename": entry.name} for entry in self.folder.iterdir()]
            content = listing if "/tree/" in path else {"id": "tester/tiny-bert", "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(content).encode(), body, {})
        elif prefix in PREFIXES and file.is_file():
            data = file.read_bytes()
            self._send(200, data, body, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        else:
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "repository"
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    handler = type("Handler", (Hub,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_model_comes_from_the_hub(endpoint: str, tmp_path: Path) -> None:
    data = tmp_path / "data" / "glue" / "sst2"
    data.mkdir(parents=True)
    table = {
        "sentence": [f"{word} is {other}" for word in WORDS for other in WORDS[:3]],
        "label": [0, 1, 1] * len(WORDS),
    }
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(table).to_parquet(data / f"{split}.parquet")
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    arguments = ["--model_name", "tester/tiny-bert", "--task_name", "sst2", "--data_dir", str(tmp_path / "data")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "prune_bert.py"), *arguments, "--mu", "0.5", "--sample_batch_size", "64"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "output/tester/tiny-bert/sst2.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["model_name"] == "tester/tiny-bert"
    assert record["method"] == "shrink"  # the default
    assert record["ratio"]["macs"] <= 0.5
    assert (tmp_path / "output/tester/tiny-bert/sst2-mu0.5/model.safetensors").is_file()
