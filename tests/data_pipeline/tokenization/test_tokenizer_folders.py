"""Tokenizers that were made elsewhere: tokenizer.json, transformers' folders, plain vocabulary files."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import TOKENIZER_FILES, Tokenizer
from data_pipeline.tokenization.training import train_tokenizer

TEXTS = ["The quick brown foxes!", "  two  spaces\n\n\ttab", "Élan naïve, 漢字 😀", "it's 1234 x", "", "the\r\nfox"]
DOCUMENTS = [text + " the quick brown fox jumps over it" for text in TEXTS] * 20
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"thequickbrownfxs!,.'1234lan"]
BERT_VOCABULARY = list(dict.fromkeys([*BERT_VOCABULARY, "the", "fox", "##es", "quick", "##x", "Élan", "elan", "漢"]))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 320)


def raw(bpe: Tokenizer) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(bpe.to_json())
    return out


def write_json(folder: Path, data: dict[str, Any], **files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder


def renamed(bpe: Tokenizer, names: dict[str, str]) -> dict[str, Any]:
    """The byte-level BPE with other names for its special tokens."""
    data = raw(bpe)
    data["model"]["vocab"] = {names.get(text, text): id_ for text, id_ in data["model"]["vocab"].items()}
    data["model"]["unk_token"] = None
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    return data


def plain_bpe_folder(bpe: Tokenizer, folder: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2 and RoBERTa were published."""
    model = raw(bpe)["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


def same_again(tokenizer: Tokenizer, folder: Path) -> None:
    """Saved and loaded, and sent to another process, it is the same."""
    tokenizer.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(TOKENIZER_FILES)
    for again in (
        Tokenizer.load(folder),
        Tokenizer.load(folder / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert (again.hash, again.roles, again.special_ids) == (tokenizer.hash, tokenizer.roles, tokenizer.special_ids)
        assert again.files() == tokenizer.files()
        assert again.encode_batch([*TEXTS, "<mask> </s> [MASK]"]) == tokenizer.encode_batch(
            [*TEXTS, "<mask> </s> [MASK]"]
        )


def test_stored_truncation_and_padding_are_off(bpe: Tokenizer, tmp_path: Path) -> None:
    data = raw(bpe)
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    loaded = Tokenizer.load(write_json(tmp_path, data))
    text = "the quick brown fox jumps over it"
    assert loaded.encode(text) == bpe.encode(text)
    assert loaded.encode_batch([text, "a"]) == [bpe.encode(text), bpe.encode("a")]
    assert loaded.hash == bpe.hash


def test_post_processors_are_not_applied(bpe: Tokenizer, tmp_path: Path) -> None:
    data = raw(bpe)
    data["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": ["</s>", 2],
        "cls": ["<s>", 0],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    loaded = Tokenizer.load(write_json(tmp_path, data))
    assert loaded.encode("the fox") == bpe.encode("the fox")
    assert loaded.encode_batch(["the fox"]) == [bpe.encode("the fox")]


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        ({}, (0, 1, 2, 3, 4)),
        (
            {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"},
            (0, 1, 2, 3, 4),
        ),
        ({"<s>": "<|begin_of_text|>", "</s>": "<|end_of_text|>", "<mask>": "<|r0|>"}, (0, 1, 2, 3, None)),
        (
            {"<s>": "<a>", "<pad>": "<b>", "</s>": "<|endoftext|>", "<unk>": "<c>", "<mask>": "<d>"},
            (None, 2, 2, None, None),
        ),
        ({"<s>": "<eos>", "</s>": "<bos>"}, (2, 1, 0, 3, 4)),
    ],
)
def test_roles_by_well_known_names(bpe: Tokenizer, tmp_path: Path, names: dict[str, str], roles: tuple[Any]) -> None:
    loaded = Tokenizer.load(write_json(tmp_path / "a", renamed(bpe, names)))
    assert (loaded.bos_id, loaded.pad_id, loaded.eos_id, loaded.unk_id, loaded.mask_id) == roles
    assert loaded.special_ids == (0, 1, 2, 3, 4)
    assert loaded.decode([*loaded.encode("the fox"), 2, 4]) == "the fox"
    same_again(loaded, tmp_path / "b")


def test_roles_by_configuration(bpe: Tokenizer, tmp_path: Path) -> None:
    data = renamed(bpe, {"<s>": "<x>", "</s>": "<y>"})
    config = {"eos_token": {"__type": "AddedToken", "content": "<y>"}, "bos_token": "<x>", "mask_token": None}
    loaded = Tokenizer.load(write_json(tmp_path / "a", data, tokenizer_config=config))
    assert (loaded.bos_id, loaded.eos_id, loaded.mask_id, loaded.unk_id) == (0, 2, None, 3)
    same_again(loaded, tmp_path / "b")
    # The older file counts too, and less than the newer.
    mapped = Tokenizer.load(write_json(tmp_path / "c", data, special_tokens_map={"eos_token": "<y>"}))
    assert (mapped.bos_id, mapped.eos_id, mapped.mask_id) == (None, 2, 4)
    both = {"tokenizer_config": config, "special_tokens_map": {"eos_token": "<x>", "mask_token": "<mask>"}}
    assert Tokenizer.load(write_json(tmp_path / "d", data, **both)).hash == loaded.hash
    # Other roles, other hash: shards of one are not for the other.
    swapped = Tokenizer.load(write_json(tmp_path / "e", data, tokenizer_config={"eos_token": "<x>"}))
    assert len({loaded.hash, mapped.hash, swapped.hash}) == 3


def test_a_declared_token_becomes_special(bpe: Tokenizer, tmp_path: Path) -> None:
    data = raw(bpe)
    data["added_tokens"] = []
    loaded = Tokenizer.load(write_json(tmp_path / "a", data, tokenizer_config={"eos_token": "</s>"}))
    assert loaded.special_ids == (2,)
    assert loaded.decode([*loaded.encode("fox"), 2]) == "fox"
    same_again(loaded, tmp_path / "b")
    data["added_tokens"] = [{**raw(bpe)["added_tokens"][2], "special": False}]
    ordinary = Tokenizer.load(write_json(tmp_path / "a", data, tokenizer_config={"eos_token": "</s>"}))
    assert ordinary.hash == loaded.hash
    assert 2 not in ordinary.encode("</s>")


def test_gaps_in_the_ids_are_covered(bpe: Tokenizer, tmp_path: Path) -> None:
    data = raw(bpe)
    data["model"]["vocab"] = {t: i if i < 300 else i + 50 for t, i in data["model"]["vocab"].items()}
    loaded = Tokenizer.load(write_json(tmp_path / "a", data))
    assert loaded.vocab_size == bpe.vocab_size + 50
    ids = [i for batch in loaded.encode_batch(TEXTS) for i in batch]
    assert bpe.vocab_size < max(ids) < loaded.vocab_size
    same_again(loaded, tmp_path / "b")


def test_raw_text_stays_text_where_the_model_itself_knows_the_names(tmp_path: Path) -> None:
    """A Unigram vocabulary as of T5 and XLM-R: special tokens among the pieces, with the best score of all."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<mask>", 0.0), ("▁", -2.0), ("▁the", -2.5)]
    pieces += [(c, -4.0 - i / 10) for i, c in enumerate("abcdefghijklmnopqrstuvwxyz</>")]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 2, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", "<mask>"])
    (tmp_path / "a").mkdir()
    backend.save(str(tmp_path / "a" / "tokenizer.json"))
    backend.encode_special_tokens = True
    assert 1 in backend.encode("the</s>", add_special_tokens=False).ids  # the library alone
    loaded = Tokenizer.load(tmp_path / "a")
    assert (loaded.pad_id, loaded.eos_id, loaded.unk_id, loaded.mask_id) == (0, 1, 2, 3)
    for text in ("the</s>", "</s>", "a <mask> b", "<pad></s>"):
        assert not set(loaded.encode(text)) & set(loaded.special_ids)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode("the fox") == backend.encode("the fox", add_special_tokens=False).ids
    same_again(loaded, tmp_path / "b")


def test_scores_of_many_digits_come_back(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"x{i}", -20 * rng.random()) for i in range(3000))]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    backend.add_special_tokens(["<unk>", "</s>"])
    (tmp_path / "a").mkdir()
    backend.save(str(tmp_path / "a" / "tokenizer.json"))
    for tokenizer in (Tokenizer.load(tmp_path / "a"), Tokenizer(backend)):
        same_again(tokenizer, tmp_path / "b")


def test_plain_vocabulary_files(bpe: Tokenizer, tmp_path: Path) -> None:
    loaded = Tokenizer.load(plain_bpe_folder(bpe, tmp_path / "a"))
    assert loaded.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)
    assert (loaded.roles, loaded.special_ids) == (bpe.roles, bpe.special_ids)
    same_again(loaded, tmp_path / "b")
    (tmp_path / "a" / "added_tokens.json").write_text(json.dumps({"<tool>": 320}))
    assert Tokenizer.load(tmp_path / "a").vocab_size == 321


transformers = pytest.importorskip("transformers")


def agrees(theirs: Any, folder: Path, tmp_path: Path) -> Tokenizer:
    """The folder as we load it gives transformers' ids and roles."""
    ours = Tokenizer.load(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
    for role in ("unk", "mask"):
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    assert ours.bos_id == (theirs.cls_token_id if theirs.bos_token_id is None else theirs.bos_token_id)
    assert ours.eos_id == (theirs.sep_token_id if theirs.eos_token_id is None else theirs.eos_token_id)
    assert ours.pad_id == (ours.eos_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert set(ours.special_ids) == set(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs)
    same_again(ours, tmp_path / "ours")
    return ours


@pytest.mark.parametrize("lower", [True, False])
def test_bert_of_transformers(tmp_path: Path, lower: bool) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n", encoding="utf-8")
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path / "plain", do_lower_case=lower)
    ours = agrees(theirs, tmp_path / "plain", tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    assert agrees(theirs, tmp_path / "saved", tmp_path).roles == ours.roles
    assert ours.encode("[MASK] [SEP]") == ours.encode("[ MASK ] [ SEP ]")  # text, not the special tokens


@pytest.mark.parametrize("name", ["GPT2TokenizerFast", "RobertaTokenizerFast"])
def test_gpt2_and_roberta_of_transformers(bpe: Tokenizer, tmp_path: Path, name: str) -> None:
    folder = plain_bpe_folder(bpe, tmp_path / "plain")
    if name == "GPT2TokenizerFast":
        vocabulary = json.loads((folder / "vocab.json").read_text())
        vocabulary["<|endoftext|>"] = vocabulary.pop("</s>")
        for text in ("<s>", "<pad>", "<unk>", "<mask>"):
            vocabulary[f"unused {text[1:-1]}"] = vocabulary.pop(text)
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    theirs = getattr(transformers, name).from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "saved")
    ours = agrees(theirs, tmp_path / "saved", tmp_path)
    plain = Tokenizer.load(folder)
    assert plain.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    assert (plain.eos_id, plain.pad_id, plain.mask_id) == (ours.eos_id, ours.pad_id, ours.mask_id)


def test_any_fast_tokenizer_of_transformers(bpe: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<u>": 0, "the": 1, "fox": 2, "!": 3}, unk_token="<u>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<u>", eos_token="<end>", mask_token="<hide>", model_max_length=4
    )
    theirs.add_tokens([AddedToken("quick", normalized=False)])
    theirs.save_pretrained(tmp_path / "saved")
    ours = agrees(theirs, tmp_path / "saved", tmp_path)
    assert ours.decode(ours.encode("the quick fox")) == "the quick fox"


@pytest.mark.parametrize("model", ["bpe", "wordpiece", "unigram"])
def test_transformers_reads_what_is_saved_here(tmp_path: Path, model: str) -> None:
    ours = train_tokenizer(DOCUMENTS, 450, model)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    roles = (theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.mask_token_id)
    assert roles == (0, 1, 2, 3, 4)


def test_transformers_is_not_needed(bpe: Tokenizer, tmp_path: Path) -> None:
    plain_bpe_folder(bpe, tmp_path / "a")
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from data_pipeline.tokenization.tokenizer import Tokenizer\n"
        "print(Tokenizer.load(sys.argv[1]).vocab_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout == f"{bpe.vocab_size}\n", done.stderr


@pytest.mark.parametrize("told_by", ["class", "merges", "alphabet"])
def test_vocabulary_files_of_another_kind_are_refused(bpe: Tokenizer, tmp_path: Path, told_by: str) -> None:
    """CLIP's files have the names of GPT-2's; read as those they lost most of the text, without a word."""
    folder = plain_bpe_folder(bpe, tmp_path / "plain")
    Tokenizer.load(folder)
    if told_by == "class":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
        match = "says that it belongs to CLIPTokenizer"
    else:
        left, right = ("q", "z</w>") if told_by == "merges" else ("\N{LOWER ONE EIGHTH BLOCK}", "q")
        vocabulary = json.loads((folder / "vocab.json").read_text())
        for text in (left, right, left + right):
            vocabulary.setdefault(text, len(vocabulary))
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        with open(folder / "merges.txt", "a", encoding="utf-8") as f:
            f.write(f"{left} {right}\n")
        match = f"'{left}' and '{right}' are no bytes as it writes them"
    with pytest.raises(UserError, match=rf"like GPT-2's, .*{match}; .*save_pretrained"):
        Tokenizer.load(folder)


def test_bert_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n", encoding="utf-8")
    for name in ("BertTokenizer", "ElectraTokenizerFast"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(UserError, match=r"vocab.txt is not .* like BERT's, .* belongs to BertJapaneseTokenizer"):
        Tokenizer.load(tmp_path)


def test_refusals(bpe: Tokenizer, tmp_path: Path) -> None:
    def refused(match: str, data: dict[str, Any] | None = None, **files: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=match):
            Tokenizer.load(write_json(tmp_path / "x", raw(bpe) if data is None else data, **files))

    nameless = renamed(bpe, {"<s>": "<a>", "<pad>": "<b>", "</s>": "<c>"})
    refused(
        r"no token that ends a document \(special tokens: <a>, <b>, <c>, <unk>, <mask>\); name one as eos", nameless
    )
    refused(r"names '<end>' as eos_token, which is not in the vocabulary", tokenizer_config={"eos_token": "<end>"})
    refused("no token that ends a document", tokenizer_config={"eos_token": None})
    refused(r"tokenizer_config\.json: eos_token must be a string", tokenizer_config={"eos_token": 2})
    (tmp_path / "x" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read as JSON"):
        Tokenizer.load(tmp_path / "x")
    (tmp_path / "x" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json must hold a JSON object"):
        Tokenizer.load(tmp_path / "x")
    (tmp_path / "x" / "tokenizer_config.json").unlink()
    dropping = raw(bpe)
    dropping["model"]["dropout"] = 0.1
    refused("BPE dropout gives other ids each time", dropping)
    unknown = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "vocab": {"</s>": 0, "a": 1},
    }
    unknown["max_input_chars_per_word"] = 100
    refused("characters outside the vocabulary cannot be encoded", {**raw(bpe), "added_tokens": [], "model": unknown})
    single = renamed(bpe, {"</s>": "</s>"})
    single["added_tokens"] = [{**single["added_tokens"][2], "id": single["model"]["vocab"]["q"], "content": "q"}]
    refused("the text 'q' would be encoded as the special token", single, tokenizer_config={"eos_token": "q"})
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer.model is not a SentencePiece model, or it is damaged"):
        Tokenizer.load(tmp_path / "sp")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "vocab.json").write_text("[]")
    (tmp_path / "bad" / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt are not a BPE vocabulary"):
        Tokenizer.load(tmp_path / "bad")
    plain_bpe_folder(bpe, tmp_path / "added")
    (tmp_path / "added" / "added_tokens.json").write_text(json.dumps({"<tool>": 400}))
    with pytest.raises(UserError, match=r"'<tool>' should have id 400, after the other tokens it gets 320"):
        Tokenizer.load(tmp_path / "added")
