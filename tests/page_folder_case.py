"""The folder that the pages' commands run in: their inputs, tiny, and the runs that they take for there."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exchange_case import write_datatrove, write_megatron
from pages_case import read_page
from spm_case import small_bpe

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = (
    "the of and to that in was with have be it is for river bridge house garden winter morning letter window stone "
    "music island captain doctor village market shadow silver mountain forest children stories old young bright quiet "
    "walked asked answered opened carried remembered returned followed beyond between under never always again only"
)
RUNS = {
    "runs/books-clm": "books-clm",
    "runs/exact": "books-clm name=exact model.attention=softmax",
    "demo/runs/demo-clm": "demo-clm",
    "demo/runs/demo-mlm": "demo-mlm",
}
"""Configuration and settings of each."""
LINKS = {
    "runs/a": "books-clm",
    "runs/b": "exact",
    "runs/demo-clm": "../demo/runs/demo-clm",
    "runs/demo-mlm": "../demo/runs/demo-mlm",
    "RUN": "runs/books-clm",
}
"""Other names of them in the pages."""
MADE_ANEW = {
    "README.md": "tokenizer shards/train shards/valid shards/books runs",
    "docs/first-run.md": "tokenizer shards/train shards/valid",
    "docs/data.md": "tokenizer shards/books",
    "docs/attention.md": "tokenizer shards/train",
    "docs/training.md": "shards/train",
}
"""What these pages make from the texts themselves, or plan before it is there."""


def documents(seed: int, count: int, words: int = 120) -> list[str]:
    """English words in sentences, so that filters of web text leave most of them."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        text = ""
        while len(text.split()) < words:
            text += " ".join(draw.choices(WORDS.split(), k=draw.randint(6, 14))).capitalize() + ".\n"
        found.append(text)
    return found


def write_inputs(folder: Path) -> None:
    """Texts, labelled texts, pairs and what else the pages read."""
    for part, seed, count in (("train", 0, 12), ("valid", 1, 3)):
        (folder / "books" / part).mkdir(parents=True)
        for number in range(count):
            text = "\n".join(documents(100 * seed + number, 12))
            (folder / "books" / part / f"book-{number}.txt").write_text(text)
    rows = [{"text": text, "label": label, "stars": stars} for text, label, stars in _labelled(60)]
    half = rows[:40], rows[40:]
    for names, suffix in (("reviews-train reviews-test", "csv"), ("train test", "csv"), ("train test", "bars")):
        for name, part in zip(names.split(), half, strict=True):
            _write_rows(folder / f"{name}.{suffix}", part)
    for path, part in (("reviews/train.csv", rows), ("reviews/test.csv", half[1])):
        _write_rows(folder / path, part)
    demo = folder / "demo" / "corpus"
    modules = [{"text": text, "label": label} for text, label, _ in _labelled(84)]
    for path, part in (
        (demo / "classify-train.jsonl", modules[:64]),  # the demo asks with 64 labels
        (demo / "classify-test.jsonl", modules[64:]),
        (folder / "ratings.jsonl", half[0]),
        (folder / "ratings-test.jsonl", half[1]),
        (folder / "notes.jsonl", rows),
        (folder / "test.jsonl", half[1]),
        (folder / "reviews.jsonl", rows),
        (folder / "text" / "a.jsonl", rows),
    ):
        _write_rows(path, part)
    _write_rows(folder / "notes.bars", rows)
    import zstandard

    (folder / "web").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(5, 30))
    (folder / "web" / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pairs = [{"query": text[:60], "positive": text[60:160]} for text in documents(6, 24, 40)]
    _write_rows(folder / "pairs.jsonl", pairs)
    scored = "".join(
        f"{' '.join(one.split()[:9])}\t{' '.join(other.split()[:9])}\t{number % 6}.0\n"
        for number, (one, other) in enumerate(zip(documents(7, 40, 12), documents(8, 40, 12), strict=True))
    )
    for path in ("dev.tsv", "train.tsv", "stsb/dev.tsv", "glue/stsb/train.tsv", "glue/stsb/test.tsv"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("sentence1\tsentence2\tscore\n" + scored)
    (folder / "prompts.txt").write_text("The river\nThe old house\n")
    (folder / "sentences.txt").write_text("The [MASK] is old.\nA [MASK] of stone.\n")
    (folder / "hosts").write_text("worker-0 slots=8\nworker-1 slots=8\n")
    (folder / "sentencepiece.model").write_bytes(small_bpe())
    for block in read_page("docs/evaluation.md").blocks:  # suites, each behind its name
        for name, text in re.findall(r"^# (mine/\S+)\n((?:.+\n)+)", block.code, re.MULTILINE):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    shutil.copytree(REPOSITORY / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__", "*.py"))


def write_rest(folder: Path, environment: Mapping[str, str]) -> None:
    """What earlier commands would have made: tokenizer, shards, runs and their gate, tokens of other programs."""
    sources = [
        "data tokenizer --input 'books/train/*.txt' --vocab-size 8192 --out tokenizer",
        "data prepare --input 'books/train/*.txt' --tokenizer tokenizer --out shards/train",
        "data prepare --input 'books/valid/*.txt' --tokenizer tokenizer --out shards/valid",
    ]
    lines = [f"nystrom {words}" for words in sources]
    lines += ["mkdir -p demo/shards", "cp -r shards/train shards/books", "cp -r shards/valid shards/law"]
    lines += ["cp -r shards/train shards/valid demo/shards"]
    lines += [f"nystrom train --config {words.replace(' ', ' --set ', 1)}" for words in RUNS.values()]
    lines += [f"nystrom eval validity lm context --checkpoint {run}" for run in ("runs/books-clm", "runs/exact")]
    lines += ["nystrom eval validity --checkpoint demo/runs/demo-clm"]
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)
    shutil.copytree(folder / "shards/books", folder / "shards/flipped")
    tokens = next((folder / "shards/flipped").glob("*.bin"))
    data = bytearray(tokens.read_bytes())
    data[1000] ^= 1
    tokens.write_bytes(data)
    ids = [[7, 8, 9, 10] * 20, [11, 12, 13] * 30]
    (folder / "megatron").mkdir()
    write_megatron(folder / "megatron" / "books", [[document] for document in ids])
    (folder / "datatrove").mkdir()
    write_datatrove(folder / "datatrove" / "a.ds", ids)
    _write_nystromformer(folder / "nystromformer-512")


def change_for(page: str, folder: Path) -> None:
    """What is otherwise in the copy of one page."""
    for name in MADE_ANEW.get(page, "").split():
        shutil.rmtree(folder / name)
    if page == "docs/data.md":  # it shows what happens where lines are cut short
        lines = (folder / "reviews.jsonl").read_text().splitlines()
        lines[7] = lines[9] = '{"text": "cut'
        (folder / "reviews.jsonl").write_text("\n".join(lines) + "\n")


def _labelled(count: int) -> list[tuple[str, str, float]]:
    """Text, label and score; the first word tells the label."""
    texts = [text.replace("\n", " ") for text in documents(3, count, 110)]
    kinds = [("wonderful", "good"), ("dreadful", "bad")]
    return [(f"{kinds[n % 2][0]} {text}", kinds[n % 2][1], 1.0 + n % 5) for n, text in enumerate(texts)]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    elif path.suffix == ".bars":
        lines = [f"{row['label']}|{row['text']}" for row in rows]
    else:
        lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def _write_nystromformer(folder: Path) -> None:
    """A folder of transformers with random weights."""
    import tokenizers
    import transformers

    special = ["<pad>", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: number for number, word in enumerate([*special, "cat", "mat", *WORDS.split()])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    config = transformers.NystromformerConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        segment_means_seq_len=64, num_landmarks=8, max_position_embeddings=66, conv_kernel_size=5,
    )  # fmt: skip
    transformers.NystromformerForMaskedLM(config).save_pretrained(folder)
    whole.save_pretrained(folder)
