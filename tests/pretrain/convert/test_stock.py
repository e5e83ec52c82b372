"""Our masked model in transformers' own Nyströmformer: it loads there, computes the same, and comes back to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_case import PUBLISHED, our_logits, tiny_model, tiny_tokenizer

from data_pipeline.errors import UserError
from data_pipeline.tokenization.tokenizer import Tokenizer
from pretrain.checkpoint.load import unique_weights, weights_hash
from pretrain.convert.facts import original_tokenizer
from pretrain.convert.source import find_source
from pretrain.convert.stock import stock_config, why_not_stock, write_stock
from pretrain.model import ModelConfig

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Importing takes seconds and belongs to no test."""
    _ = transformers.NystromformerForMaskedLM, transformers.AutoModelForMaskedLM, transformers.pipeline


FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "landmarks": ({}, 64),
    "one-for-two": ({}, 16),
    "short": ({"num_landmarks": 32, "inverse_init": "block", "inverse_iterations": 9}, 63),
    "exact": ({"attention": "softmax", "inverse_init": "block"}, 50),
    "own-head": ({"tie_embeddings": False}, 64),
    "repeated-positions": ({"attention": "softmax", "trained_positions": 24}, 64),
}
"""Changes of the model, and the length."""


@pytest.mark.parametrize("form", FORMS)
def test_stock_transformers_computes_the_same(tokenizer: Tokenizer, tmp_path: Path, form: str) -> None:
    changes, length = FORMS[form]
    loaded = tiny_model(tokenizer, **changes)
    write_stock(loaded, tmp_path, length)
    theirs, said = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "NystromformerForMaskedLM"
    assert (set(said["missing_keys"]), set(said["unexpected_keys"])) == (set(), set())
    ids = torch.randint(0, tokenizer.vocab_size, (3, length))
    with torch.no_grad():
        got = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        hidden = transformers.AutoModel.from_pretrained(tmp_path)(input_ids=ids).last_hidden_state
        expected = loaded.model(ids, hidden=True).hidden
    # 4e-6 measured at logits of up to 4, also of 12 layers of 768 at 4096 tokens; 1e-4 is what is promised.
    torch.testing.assert_close(got, our_logits(loaded, ids), rtol=0, atol=4e-5)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=4e-5)


def test_exact_attention_takes_other_lengths_there_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = tiny_model(tokenizer, attention="softmax")
    write_stock(loaded, tmp_path, 64)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = torch.randint(0, tokenizer.vocab_size, (2, 37))
    torch.testing.assert_close(theirs(input_ids=ids).logits, our_logits(loaded, ids), rtol=0, atol=4e-5)


def test_a_classifier_gets_the_encoder_and_a_new_head(tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = tiny_model(tokenizer)
    write_stock(loaded, tmp_path, 64)
    auto = transformers.AutoModelForSequenceClassification
    theirs, said = auto.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert {name.split(".")[0] for name in said["missing_keys"]} == {"classifier"}
    assert {name.split(".")[0] for name in said["unexpected_keys"]} == {"cls"}
    value = theirs.nystromformer.encoder.layer[1].attention.self.value.weight
    assert value.equal(unique_weights(loaded.model)["layers.1.attention.value.weight"])


@pytest.mark.parametrize("attention", ["softmax", "nystrom"])
def test_the_pipeline_fills_masks_with_our_probabilities(tokenizer: Tokenizer, tmp_path: Path, attention: str) -> None:
    loaded = tiny_model(tokenizer, attention=attention)
    write_stock(loaded, tmp_path, 64)
    fill = transformers.pipeline("fill-mask", model=str(tmp_path), top_k=5)
    mask = tokenizer.name_of(loaded.tokenizer.mask_id or 0)
    text = f"the cat {mask} on the mat"
    ids = [*tokenizer.encode("the cat"), tokenizer.mask_id, *tokenizer.encode(" on the mat")]
    if attention == "nystrom":  # a text of exactly that length
        text, ids = text + "a" * (64 - len(ids)), []
        ids = fill.tokenizer(text)["input_ids"]
        text += "." * (64 - len(ids))
        ids = fill.tokenizer(text)["input_ids"]
        assert len(ids) == 64
    assert fill.tokenizer(text)["input_ids"] == ids
    logits = our_logits(loaded, torch.tensor([ids]))[0, ids.index(tokenizer.mask_id)]
    expected = logits.softmax(-1).topk(5)
    found = fill(text)
    assert [row["token"] for row in found] == expected.indices.tolist()
    torch.testing.assert_close(torch.tensor([row["score"] for row in found]), expected.values, rtol=1e-4, atol=0)


def test_the_folder_has_the_tokenizer_and_its_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_stock(tiny_model(tokenizer), tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("many small words")["input_ids"] == tokenizer.encode("many small words")
    assert (theirs.mask_token_id, theirs.pad_token_id) == (tokenizer.mask_id, tokenizer.pad_id)
    assert theirs.model_max_length == 64
    assert original_tokenizer(tmp_path).hash == tokenizer.hash
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    ids = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
    assert ids == (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    assert (config.segment_means_seq_len, config.num_landmarks, config.max_position_embeddings) == (64, 8, 64)


def test_a_tokenizer_that_adds_tokens_adds_none_there_and_is_whole_again_here(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer().to_json())
    begin, end = ((name, backend.token_to_id(name)) for name in ("<s>", "</s>"))
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[begin, end])
    tokenizer = Tokenizer(backend)
    write_stock(tiny_model(tokenizer), tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("many small words")["input_ids"] == tokenizer.encode("many small words")
    assert Tokenizer.load(tmp_path).hash != tokenizer.hash
    assert original_tokenizer(tmp_path).hash == tokenizer.hash
    # One that was changed there is another tokenizer.
    theirs.add_tokens(["new"])
    theirs.save_pretrained(tmp_path)
    assert original_tokenizer(tmp_path).hash == Tokenizer.load(tmp_path).hash != tokenizer.hash
    (tmp_path / "nystrom.json").write_text("{")
    with pytest.raises(UserError, match=r"nystrom\.json is damaged"):
        original_tokenizer(tmp_path)


# There and back.


@pytest.mark.parametrize("form", ["landmarks", "exact", "own-head"])
@pytest.mark.parametrize(("dtype", "shard"), [("fp32", "5GB"), ("fp32", "4KB"), ("bf16", "5GB"), ("fp16", "5GB")])
def test_the_way_back_gives_the_same_weights(
    tokenizer: Tokenizer, tmp_path: Path, form: str, dtype: str, shard: str
) -> None:
    loaded = tiny_model(tokenizer, **FORMS[form][0])
    with torch.no_grad():  # -0 is not 0, to the bit
        loaded.model.embeddings.position_embeddings.weight[5] = -0.0
    write_stock(loaded, tmp_path, FORMS[form][1], dtype, shard)
    assert ((tmp_path / "model.safetensors.index.json").is_file(), len(list(tmp_path.glob("*.safetensors"))) > 5) == (
        (True, True) if shard == "4KB" else (False, False)
    )
    number = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    rounded = {name: value.to(number).float() for name, value in unique_weights(loaded.model).items()}
    converted = find_source(tmp_path).read(tmp_path)
    assert weights_hash(dict(converted.weights)) == weights_hash(rounded)
    said = [note for note in converted.notes if "float32 holds the same numbers" in note]
    assert len(said) == (dtype != "fp32")
    # Configuration, too, but for what transformers has no key for.
    kept = {"objective", "vocab_size", "hidden_size", "num_layers", "num_heads", "norm", "max_positions", "conv_kernel"}
    kept |= {"norm_eps", "tie_embeddings", "init_std", "attention", "positions", "dropout", "intermediate_size"}
    ours, back = loaded.model_config.model_dump(), converted.model.model_dump()
    assert {key: back[key] for key in kept} == {key: ours[key] for key in kept}


def test_transformers_own_save_comes_back_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = tiny_model(tokenizer)
    write_stock(loaded, tmp_path / "one", 64)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "two")
    back = find_source(tmp_path / "two").read(tmp_path / "two")
    assert weights_hash(dict(back.weights)) == loaded.weights_hash


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_on_disk_compute_where_transformers_can(tokenizer: Tokenizer, tmp_path: Path, dtype: str) -> None:
    """Landmarks crash there in 16 bits: the folder asks for float32."""
    half = torch.bfloat16 if dtype == "bf16" else torch.float16
    for attention, number in (("nystrom", torch.float32), ("softmax", half)):
        write_stock(tiny_model(tokenizer, attention=attention), tmp_path / attention, 64, dtype)
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / attention)
        assert theirs.dtype == number
        assert theirs(input_ids=torch.zeros(1, 64, dtype=torch.long)).logits.isfinite().all()


# What it is not.


@pytest.mark.parametrize(
    ("changes", "length", "words"),
    [
        ({"objective": "clm"}, None, "model.objective is clm"),
        ({"norm": "pre"}, None, "model.norm is pre"),
        ({"positions": "rotary"}, None, "model.positions is rotary"),
        ({"attention": "window"}, None, "model.attention is window: "),
        ({"attention": ["window", "nystrom"]}, None, "model.attention is window in layer 1: "),
        (
            {"attention": ["nystrom", "softmax"]},
            64,
            "model.attention is softmax in layer 2 and has landmarks in others",
        ),
        ({"conv_kernel": 0}, None, "model.conv_kernel is 0"),
        ({"ffn": "swiglu"}, None, "model.ffn is swiglu: .* has two matrices and GELU"),
        ({"norm_kind": "rmsnorm"}, None, "model.norm_kind is rmsnorm: .* has layer norms"),
        ({"qk_norm": True}, None, "model.qk_norm is true: .* has no norm of queries and keys"),
        ({"bias": False}, None, "model.bias is false: .* has biases everywhere"),
        ({"positions": ["rotary", "none"]}, None, r"model.positions is \[rotary, none\]: .* has a learned table"),
        ({"landmark_inverse": False}, 64, "model.landmark_inverse is false"),
        ({"inverse_iterations": 7}, 64, "model.inverse_iterations is 7.* has 6"),
        ({"inverse_init": "block"}, 64, "model.inverse_init is block.* has `original`"),
        ({}, 60, "60 tokens are no multiple of model.num_landmarks 8"),
        ({"attention": "softmax"}, 65, "65 tokens are more than model.max_positions 64"),
    ],
)
def test_why_not(tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any], length: int | None, words: str) -> None:
    config = ModelConfig(**{**PUBLISHED, "vocab_size": 300, **changes})
    (reason,) = why_not_stock(config, length)
    assert re.search(words, reason), reason
    with pytest.raises(UserError, match="is not transformers' own Nyströmformer: .*" + words):
        write_stock(tiny_model(tokenizer, **changes), tmp_path / "out", length or 64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"landmark_inverse": False, "num_landmarks": 16},
        {"inverse_init": "block"},
        {"attention": ["nystrom", "softmax"]},
    ],
)
def test_short_texts_need_no_landmarks(changes: dict[str, Any]) -> None:
    config = ModelConfig(**{**PUBLISHED, "vocab_size": 300, **changes})
    assert why_not_stock(config, 15) == []
    assert stock_config(config, {}, 15)["num_landmarks"] == 15
    assert stock_config(ModelConfig(**PUBLISHED), {}, 64)["num_landmarks"] == 8


def test_the_other_start_of_the_inverse_is_another_function(tokenizer: Tokenizer) -> None:
    ids = torch.randint(0, tokenizer.vocab_size, (2, 64))
    block, original = (our_logits(tiny_model(tokenizer, inverse_init=name), ids) for name in ("block", "original"))
    assert float((block - original).abs().max()) > 1e-3
    config = transformers.NystromformerConfig(segment_means_seq_len=128, inv_coeff_init_option=True)
    with pytest.raises(TypeError):
        transformers.NystromformerModel(config)


def test_a_weight_too_large_for_16_bits_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = tiny_model(tokenizer)
    with torch.no_grad():
        loaded.model.layers[1].attention.value.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"layer.1.attention.self.value.weight has values that fp16 cannot hold"):
        write_stock(loaded, tmp_path / "out", 64, "fp16")
    write_stock(loaded, tmp_path / "out", 64, "bf16")


def test_a_folder_without_its_last_file_is_no_checkpoint(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_model(tokenizer)
    write_stock(loaded, tmp_path, 64)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("pretrain.convert.stock.facts", fail)
    with pytest.raises(OSError, match="no space"):
        write_stock(loaded, tmp_path, 64)
    assert not (tmp_path / "config.json").exists()
