"""Train a small OPT-architecture language model from scratch: the bundled demo model of the decoder scripts.

    torchrun --nproc_per_node 2 prerequisites/train_opt.py --data_dir DIR --minutes 100

Reads DIR/lm_corpus/{reviews,novels}.parquet and DIR/ptb/train.txt, learns a byte-level BPE vocabulary, trains for a
given time and writes a Hugging Face folder in float16. The learning rate follows the clock, not a number of steps, so
the same command makes the most of a laptop, of a busy machine and of a GPU. Interrupted, it goes on with --resume.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from shrinkformer.dataset.corpora import evaluation_windows
from shrinkformer.dataset.corpus import CORPORA
from shrinkformer.evaluate.perplexity import evaluate_perplexity
from shrinkformer.utils.parallel import Workers, local_device, workers_of

END = "</s>"


@dataclass(frozen=True)
class Options:
    """The command line; see ``--help``."""

    data_dir: Path = Path("../shared/data")
    output: Path = Path("models/opt-mini")
    work_dir: Path = Path("output/train_opt")
    minutes: float = 60.0
    vocabulary: int = 8192
    layers: int = 7
    hidden: int = 256
    heads: int = 8
    length: int = 512
    sequences: int = 16
    learning_rate: float = 4e-3
    ptb_repeats: int = 3
    seed: int = 0
    resume: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def read_documents(options: Options) -> dict[str, list[str]]:
    """The training texts by corpus; nothing that a perplexity is measured on is among them."""

    def column(name: str) -> list[str]:
        texts = parquet.read_table(options.data_dir / "lm_corpus" / f"{name}.parquet").column("text").to_pylist()
        return [str(text) for text in texts]

    sentences = (options.data_dir / "ptb" / "train.txt").read_text(encoding="utf-8").splitlines()
    articles = [
        " ".join(line.strip() for line in sentences[start : start + 25]) for start in range(0, len(sentences), 25)
    ]
    return {"reviews": column("reviews"), "novels": column("novels"), "ptb": articles}


def learn_tokenizer(documents: dict[str, list[str]], options: Options) -> PreTrainedTokenizerFast:
    """A byte-level BPE; ``<unk>`` is no special token, because WikiText and Penn Treebank write it out."""
    rng = np.random.default_rng(options.seed)
    sample = documents["ptb"] + [
        documents["reviews"][row] for row in rng.permutation(len(documents["reviews"]))[:15000]
    ]
    sample += [text[: len(text) // 4] for text in documents["novels"]]
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(sample, vocab_size=options.vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=learner._tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=options.length,
    )


def write_tokens(documents: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, int]:
    """Token ids of each corpus as 16-bit numbers, documents in a fixed random order, each closed by ``END``."""
    counts = {}
    for name, texts in documents.items():
        order = np.random.default_rng(0).permutation(len(texts))
        with (folder / f"{name}.bin").open("wb") as file:
            for start in range(0, len(order), 1000):
                batch = [texts[row] for row in order[start : start + 1000]]
                for row in tokenizer(batch, verbose=False)["input_ids"]:
                    file.write(np.asarray([*row, tokenizer.eos_token_id], dtype=np.uint16).tobytes())
        counts[name] = (folder / f"{name}.bin").stat().st_size // 2
    return counts


def prepare(options: Options) -> None:
    """Vocabulary and token files, once."""
    if (options.work_dir / "tokens.json").is_file():
        return
    options.work_dir.mkdir(parents=True, exist_ok=True)
    documents = read_documents(options)
    tokenizer = learn_tokenizer(documents, options)
    tokenizer.save_pretrained(options.work_dir / "tokenizer")
    counts = write_tokens(documents, tokenizer, options.work_dir)
    (options.work_dir / "tokens.json").write_text(json.dumps(counts))
    print(f"tokens: {counts}", flush=True)


class Windows:
    """Training windows in random order, epoch after epoch; every process draws its own."""

    def __init__(self, options: Options, rank: int) -> None:
        self.length = options.length
        self._corpora: list[NDArray[np.uint16]] = []
        for name in json.loads((options.work_dir / "tokens.json").read_text()):
            tokens = np.memmap(options.work_dir / f"{name}.bin", dtype=np.uint16, mode="r")
            self._corpora += [tokens] * (options.ptb_repeats if name == "ptb" else 1)
        self._rng = np.random.default_rng([options.seed, rank, int(time.time()) if options.resume else 0])

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        while True:
            shift = int(self._rng.integers(self.length))
            starts = [
                (corpus, start)
                for corpus in self._corpora
                for start in range(shift, len(corpus) - self.length, self.length)
            ]
            for index in self._rng.permutation(len(starts)):
                corpus, start = starts[index]
                yield corpus[start : start + self.length].astype(np.int64)


def build_model(options: Options) -> OPTForCausalLM:
    """The model at its random start."""
    torch.manual_seed(options.seed)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            word_embed_proj_dim=options.hidden,
            ffn_dim=4 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            max_position_embeddings=options.length,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).to(options.device)


def build_optimizers(model: nn.Module, options: Options) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for everything else."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=options.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=options.learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def rate(progress: float, step: int) -> float:
    """Share of the full learning rate: 100 steps of warm-up, constant, linear to zero from 60 % of the time."""
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.0, 1 - progress) / 0.4)


def average_gradients(model: nn.Module, extra: float, workers: Workers) -> float:
    """Average gradients, and one number, over the processes."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat(
        [gradient.flatten() for gradient in gradients] + [torch.tensor([extra], device=gradients[0].device)]
    )
    workers.sum_(flat)
    flat /= workers.size
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
    return float(flat[-1])


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def train(options: Options, workers: Workers) -> None:
    """Train until the time is over; the state is saved every five minutes."""
    options = replace(options, device=local_device(options.device))
    model, state_file = build_model(options), options.work_dir / "state.pt"
    optimizers = build_optimizers(model, options)
    step, spent, tokens = 0, 0.0, 0
    if options.resume and state_file.is_file():
        state = torch.load(state_file, map_location=options.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent, tokens = state["step"], state["spent"], state["tokens"]
    if spent >= 60 * options.minutes:
        return
    forward = torch.compile(loss_of)
    stream = iter(Windows(options, workers.rank))
    began = saved_at = time.time()
    share = options.sequences // workers.size
    while True:
        elapsed = spent + time.time() - began
        windows = torch.from_numpy(np.stack([next(stream) for _ in range(share)])).to(options.device)
        with torch.autocast(torch.device(options.device).type, torch.bfloat16):
            loss = forward(model, windows)
        torch.autograd.backward(loss)
        elapsed = average_gradients(model, elapsed, workers)
        progress = elapsed / (60 * options.minutes)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, full in zip(optimizers, (1.0, 0.5), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * full * rate(progress, step)
            optimizer.step()
            optimizer.zero_grad()
        step, tokens = step + 1, tokens + share * workers.size * options.length
        if workers.is_main and step % 50 == 0:
            speed = tokens / elapsed
            print(
                f"step {step} loss {loss.item():.3f} {progress:.1%} {tokens / 1e6:.1f}M tokens {speed:.0f}/s",
                flush=True,
            )
        finished = progress >= 1
        if workers.is_main and (finished or time.time() - saved_at > 300):
            saved_at = time.time()
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save({**state, "step": step, "spent": elapsed, "tokens": tokens}, state_file.with_suffix(".new"))
            os.replace(state_file.with_suffix(".new"), state_file)
        if finished:
            return


def export(options: Options) -> None:
    """The trained model as a Hugging Face folder in float16, with a record of its training."""
    state = torch.load(options.work_dir / "state.pt", map_location="cpu", weights_only=True)
    model = build_model(options).cpu()
    model.load_state_dict(state["model"])
    model.half().save_pretrained(options.output)
    PreTrainedTokenizerFast.from_pretrained(options.work_dir / "tokenizer").save_pretrained(options.output)
    compact = json.loads((options.output / "tokenizer.json").read_text(encoding="utf-8"))
    (options.output / "tokenizer.json").write_text(json.dumps(compact, separators=(",", ":")), encoding="utf-8")
    record: dict[str, Any] = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "corpus_tokens": json.loads((options.work_dir / "tokens.json").read_text()),
        "training_tokens": state["tokens"],
        "steps": state["step"],
        "seconds": round(state["spent"]),
        "versions": {"torch": torch.__version__},
    }
    (options.output / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.output / "README.md").write_text(model_card(options, record), encoding="utf-8")


def model_card(options: Options, record: dict[str, Any]) -> str:
    """What the model is, what it was trained on, and how well it predicts texts that it has not seen."""
    model = OPTForCausalLM.from_pretrained(options.output, dtype=torch.float32)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(options.output)
    rows = []
    for name, corpus in CORPORA.items():
        windows = evaluation_windows(corpus, tokenizer, length=options.length, data_dir=options.data_dir)
        found = evaluate_perplexity(model, windows, batch_size=8, device=options.device)
        rows.append(f"| {name} | {found.value:.2f} ± {found.stderr:.2f} | {found.tokens:,} |")
    corpora = ", ".join(f"{name} {count:,}" for name, count in record["corpus_tokens"].items())
    return f"""---
library_name: transformers
tags: [opt, demo]
---
# opt-mini

A small language model of the OPT architecture to try pruning and quantization on: {options.layers} blocks, width
{options.hidden}, {options.heads} heads, windows of {options.length} tokens, {options.vocabulary:,} byte-level BPE
tokens, tied embeddings, float16. Trained from scratch by `prerequisites/train_opt.py` on
{record["training_tokens"]:,} tokens of film reviews (Large Movie Review Dataset), English novels of 1840-1939 and the
train split of Penn Treebank (sizes in tokens: {corpora}; Penn Treebank counts {options.ptb_repeats} times),
in {record["seconds"] / 60:.0f} minutes on `{options.device}`. It has seen neither WikiText nor C4.

| corpus | perplexity per token | tokens |
|---|---|---|
{chr(10).join(rows)}

WikiText-2 in its tokenised form (with `<unk>`). `python opt_eval.py --data_dir DIR` prints the same figures.
"""


def parse(arguments: Sequence[str] | None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in fields(Options):
        kind: dict[str, Any] = {"type": type(entry.default), "default": entry.default}
        parser.add_argument(f"--{entry.name}", **({"action": "store_true"} if entry.type is bool else kind))
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare, train, export."""
    options = parse(arguments)
    with workers_of(options.device) as workers:
        if workers.is_main:
            prepare(options)
        workers.barrier()
        train(options, workers)
        if workers.is_main:
            export(options)
            print(f"wrote {options.output}", flush=True)


if __name__ == "__main__":
    main()
