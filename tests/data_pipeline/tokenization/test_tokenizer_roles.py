"""Roles of tokens, and the objective that needs one of them."""

from __future__ import annotations

import pytest

from data_pipeline.errors import UserError
from data_pipeline.tokenization.roles import ROLES, Roles, check_objective, declared_roles, find_roles

BERT = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


def test_bert_by_names_and_by_configuration() -> None:
    expected = Roles(bos=101, pad=0, eos=102, unk=100, mask=103)
    assert find_roles({}, BERT, "[UNK]", "x") == expected
    keys = ("pad", "unk", "cls", "sep", "mask")
    config = {f"{key}_token": f"[{key.upper()}]" for key in keys} | {"do_lower_case": True}
    declared = declared_roles(config)
    assert set(declared) == set(ROLES)
    assert find_roles(declared, BERT, "[UNK]", "x") == expected


def test_end_of_text_wins_over_separator_whatever_the_order() -> None:
    for config in (
        {"sep_token": "[SEP]", "eos_token": "[PAD]"},
        {"eos_token": {"content": "[PAD]"}, "sep_token": "[SEP]"},
    ):
        assert declared_roles(config) == {"eos": "[PAD]"}
    assert declared_roles({"eos_token": None, "sep_token": "[SEP]"}) == {"eos": "[SEP]"}
    assert declared_roles({"eos_token": None, "sep_token": None}) == {"eos": None}


def test_padding_falls_back_to_the_end() -> None:
    assert find_roles({}, {"<|endoftext|>": 50256}, None, "x") == Roles(None, 50256, 50256, None, None)
    assert find_roles({"pad": None}, BERT, None, "x").pad == 102
    assert find_roles({}, {"</s>": 1, "<weird>": 7}, "<weird>", "x").unk == 7


def test_only_roles_that_exist_are_listed() -> None:
    assert Roles(None, 2, 2, None, 4).as_dict() == {"pad": 2, "eos": 2, "mask": 4}


def test_what_is_declared_absent_is_absent() -> None:
    assert find_roles({"mask": None}, BERT, None, "x").mask is None
    with pytest.raises(UserError, match=r"^here: no token that ends a document \(special tokens: \[PAD\], \[UNK\]"):
        find_roles({"eos": None}, BERT, None, "here")
    with pytest.raises(UserError, match=r"\(special tokens: none\)"):
        find_roles({}, {}, None, "here")
    with pytest.raises(UserError, match="mask_token must be a string or an object with 'content', it is 3"):
        declared_roles({"mask_token": 3})


def test_masked_language_modelling_needs_a_mask() -> None:
    for roles in ({"pad": 1, "eos": 1}, ["pad", "eos", "bos"]):
        check_objective(roles, "clm", "shards/train")
        with pytest.raises(UserError, match=r"shards/train: masked language modelling needs a mask token"):
            check_objective(roles, "mlm", "shards/train")
    check_objective({"pad": 1, "eos": 1, "mask": 4}, "mlm", "x")
