"""``nystrom convert from-hf`` of folders that transformers writes: ours computes what theirs does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import program
from pretrain.checkpoint.load import LoadedModel, load_model

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "ran", "##s", "##ed", "mat"]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Importing takes seconds and belongs to no test."""
    for kind in ("Nystromformer", "Bert", "Roberta"):
        getattr(transformers, f"{kind}ForMaskedLM")


def write(folder: Path, kind: str, task: str = "ForMaskedLM", seed: int = 0, **changes: Any) -> Any:
    """A random model of a tiny size in ``folder``, with BERT's tokenizer; returns it in evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}{task}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return model


def converted(folder: Path, out: Path) -> tuple[LoadedModel, dict[str, Any]]:
    """The folder that the command writes, and its account."""
    assert program.main(["convert", "from-hf", str(folder), str(out)]) == 0
    return load_model(out), json.loads((out / "converted.json").read_text())


def logits_of(model: Any, loaded: LoadedModel, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 40, (2, length))
    with torch.no_grad():
        return model(input_ids=ids).logits, loaded.model(ids).logits


def left_over(account: dict[str, Any]) -> set[str]:
    return {row["name"] for row in account["tensors"] if row["fate"] == "left over"}


def test_accounts_name_every_tensor_of_theirs(tmp_path: Path) -> None:
    for kind in ("Nystromformer", "Bert", "Roberta"):
        model = write(tmp_path / kind, kind)
        _, account = converted(tmp_path / kind, tmp_path / f"{kind}-out")
        theirs = [name for row in account["tensors"] for name in row.get("from", [row["name"]])]
        saved = {name for name in model.state_dict() if ".decoder." not in name}
        assert sorted(theirs) == sorted(saved)


@pytest.mark.parametrize(
    ("sizes", "length", "attention"),
    [
        ({"segment_means_seq_len": 64, "num_landmarks": 8}, 64, "nystrom"),
        ({"segment_means_seq_len": 64, "num_landmarks": 64}, 37, "softmax"),
        ({"segment_means_seq_len": 64, "num_landmarks": 8, "tie_word_embeddings": False}, 64, "nystrom"),
    ],
)
def test_nystromformers_compute_the_same(tmp_path: Path, sizes: dict[str, Any], length: int, attention: str) -> None:
    base = {"max_position_embeddings": 70, "conv_kernel_size": 5}
    model = write(tmp_path / "theirs", "Nystromformer", **base, **sizes)
    loaded, account = converted(tmp_path / "theirs", tmp_path / "out")
    assert loaded.model_config.attention == attention
    expected, got = logits_of(model, loaded, length)
    # 3e-6 measured: token types and positions are added in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)
    assert not {row["name"] for row in account["tensors"] if row["fate"] == "new"}


def test_a_nystromformer_of_another_task_gives_its_encoder(tmp_path: Path) -> None:
    model = write(tmp_path / "theirs", "Nystromformer", "ForSequenceClassification", num_labels=3)
    loaded, account = converted(tmp_path / "theirs", tmp_path / "out")
    assert left_over(account) == {f"classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")}
    ids = torch.randint(5, 40, (2, 64))
    with torch.no_grad():
        hidden = model.nystromformer(input_ids=ids).last_hidden_state
        torch.testing.assert_close(loaded.model(ids, hidden=True).hidden, hidden, rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_become_float32_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write(tmp_path / "theirs", "Nystromformer", type_vocab_size=1)
    model.to(dtype).save_pretrained(tmp_path / "theirs")
    loaded, account = converted(tmp_path / "theirs", tmp_path / "out")
    name = str(dtype).removeprefix("torch.")
    assert any(f"tensors are {name} there; float32 holds the same numbers" in note for note in account["notes"])
    theirs = model.nystromformer.encoder.layer[1].output.dense.weight
    assert loaded.model.layers[1].feed_forward.output.weight.equal(theirs.float())


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
@pytest.mark.parametrize("act", ["gelu_new", "gelu"])
def test_bert_and_roberta_compute_the_same_but_for_exact_gelu(tmp_path: Path, kind: str, act: str) -> None:
    model = write(tmp_path / "theirs", kind, hidden_act=act, max_position_embeddings=66)
    loaded, account = converted(tmp_path / "theirs", tmp_path / "out")
    assert loaded.model_config.max_positions == (66 if kind == "Bert" else 64)
    assert (loaded.model_config.attention, loaded.model_config.conv_kernel) == ("softmax", 0)
    expected, got = logits_of(model, loaded, 60)
    # 2e-6 measured with the same activation, 1.3e-3 with the exact GELU; of hidden states 7e-4.
    same = kind == "Bert" and act == "gelu_new"
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 if same else 1e-2)
    assert any("activation is the exact GELU there" in note for note in account["notes"]) == (not same)
    ids = torch.randint(5, 40, (2, 60))
    with torch.no_grad():
        hidden = getattr(model, kind.lower())(input_ids=ids).last_hidden_state
    atol = 2e-5 if act == "gelu_new" else 5e-3
    torch.testing.assert_close(loaded.model(ids, hidden=True).hidden, hidden, rtol=0, atol=atol)
    assert any("then newly initialised" in note for note in account["notes"])


def test_bert_of_its_own_pretraining_leaves_pooler_and_next_sentence(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "Bert", "ForPreTraining")
    state = transformers.BertForPreTraining.from_pretrained(tmp_path / "theirs").state_dict()
    # As its first files are: layer norms with gamma and beta, the word table twice, in a pickle.
    renamed = {}
    for name, value in state.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        renamed[name] = value
    (tmp_path / "theirs/model.safetensors").unlink()
    torch.save(renamed, tmp_path / "theirs/pytorch_model.bin")
    loaded, account = converted(tmp_path / "theirs", tmp_path / "out")
    assert left_over(account) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.bias",
    }
    assert any(note.startswith("gamma and beta of layer norms") for note in account["notes"])
    norm = state["bert.encoder.layer.0.output.LayerNorm.weight"]
    assert loaded.model.layers[0].feed_forward_norm.weight.equal(norm)


def test_an_encoder_alone_gets_a_new_head(tmp_path: Path) -> None:
    model = write(tmp_path / "theirs", "Bert", "Model", hidden_act="gelu_new")
    loaded, account = converted(tmp_path / "theirs", tmp_path / "out")
    assert {row["name"].split(".")[0] for row in account["tensors"] if row["fate"] == "new"} == {"head"}
    ids = torch.randint(5, 40, (2, 30))
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(loaded.model(ids, hidden=True).hidden, hidden, rtol=0, atol=3e-5)


def test_the_tokenizer_comes_with_it(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "Bert")
    loaded, _ = converted(tmp_path / "theirs", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    text = "the cats sat on a mat"
    assert loaded.tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert loaded.tokenizer.mask_id == theirs.mask_token_id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_decoder": True}, "is_decoder is True: an encoder alone can be converted"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"pad_token_id": 510}, "max_position_embeddings leaves no positions behind row 511"),
    ],
)
def test_other_berts_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "theirs", "Roberta")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps({**config, **changes}))
    assert program.main(["convert", "from-hf", str(tmp_path / "theirs"), str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
