"""Tiny tokenizers and examples that the data tests share; nothing is downloaded."""

import datasets
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, DistilBertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "red",
    "blue",
    "big",
    "was",
    "seen",
    "in",
    "paris",
    "by",
    "anna",
    "bob",
    "good",
    "bad",
    "film",
    "who",
    "where",
    "?",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def wordpiece_vocabulary() -> dict[str, int]:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *(f"##{c}" for c in LETTERS), ".", ","]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def bert_tokenizer(**options: object) -> BertTokenizer:
    return BertTokenizer(vocab=wordpiece_vocabulary(), **options)


def distilbert_tokenizer(**options: object) -> DistilBertTokenizer:
    return DistilBertTokenizer(vocab=wordpiece_vocabulary(), model_input_names=["input_ids", "attention_mask"])


def roberta_tokenizer(**options: object) -> RobertaTokenizer:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    return RobertaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], **options)


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a padding token."""
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def sentiment(rows: int) -> datasets.Dataset:
    """Sentences of 1 to 20 words; the label says whether "good" is among them."""
    texts = []
    for row in range(rows):
        words = [WORDS[(7 * row + 3 * place) % 17] for place in range(1 + (5 * row) % 20)]
        texts.append(" ".join([*words, "good" if row % 2 else "bad"]))
    return datasets.Dataset.from_dict({"sentence": texts, "label": [row % 2 for row in range(rows)]})


def pairs(rows: int) -> datasets.Dataset:
    first = [f"the cat number {'i' * (row % 9 + 1)} sat" for row in range(rows)]
    second = [f"a dog called {'o' * (row % 5 + 1)} ran on" for row in range(rows)]
    labels = [5.0 * row / max(rows - 1, 1) for row in range(rows)]
    return datasets.Dataset.from_dict({"sentence1": first, "sentence2": second, "label": labels})


def questions(rows: int) -> datasets.Dataset:
    """Contexts of 10 to 190 words with one name in them; every fifth question has no answer."""
    contexts, answers = [], []
    for row in range(rows):
        filler = [WORDS[(3 * row + place) % 14] for place in range(10 + (60 * row) % 181)]
        place = (11 * row) % len(filler)
        words = [*filler[:place], "Anna", "Bob,", *filler[place:]]
        contexts.append("  " + " ".join(words) + ".")
        start = contexts[-1].index("Anna Bob")
        empty = row % 5 == 4
        answers.append({"text": [] if empty else ["Anna Bob"], "answer_start": [] if empty else [start]})
    return datasets.Dataset.from_dict(
        {
            "id": [str(row) for row in range(rows)],
            "question": [f" who was seen by {'the ' * (row % 4)}cat ?" for row in range(rows)],
            "context": contexts,
            "answers": answers,
        }
    )
