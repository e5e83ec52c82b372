"""Forms of attention by layer: what a pattern means, that one name is what it was, and what is refused.

That a model with a pattern has every property of a form is tested with the forms: test_model.py, test_decoding.py.
"""

from __future__ import annotations

import json
from typing import Any

import form_case as case
import pytest
import torch
import yaml
from toy_forms import Near

from data_pipeline.errors import UserError
from pretrain.config import parse_config
from pretrain.model import ModelConfig, build_model
from pretrain.model.attention.pattern import by_layer, label, shortest, written
from pretrain.model.attention.registry import FORMS, form_of, forms_of, pattern_of
from pretrain.model.decoding import cache_elements
from pretrain.model.flops import all_attention_flops_per_token, attention_flops_per_token, forward_flops_per_token

WWN = ("window", "window", "nystrom")


def run_config(**model: Any) -> Any:
    stage = {"until_tokens": 1024, "seq_len": 64, "micro_batch": 1}
    rest = {"data": {"train": "x"}, "curriculum": [stage], "batch_tokens": 128}
    return parse_config({"name": "x", "model": {"vocab_size": 31, **model}, **rest})


def test_a_pattern_is_repeated_and_cut() -> None:
    assert by_layer(WWN, 7) == (*WWN, *WWN, "window")
    assert by_layer("nystrom", 2) == ("nystrom", "nystrom")
    config = ModelConfig(attention=list(WWN), num_layers=7)
    assert config.attention_by_layer == by_layer(WWN, 7)
    assert config.attention_label == label(WWN, 7) == "window x5 + nystrom x2"
    assert [config.of_layer(number).attention for number in range(7)] == list(config.attention_by_layer)
    assert list(forms_of(config)) == ["window", "nystrom"]
    built = build_model(ModelConfig(attention=WWN, num_layers=4, vocab_size=31, hidden_size=16))
    assert [layer.attention.form.name for layer in built.layers] == ["window", "window", "nystrom", "window"]


def test_the_shortest_description_is_kept() -> None:
    assert shortest(["nystrom"]) == shortest(["nystrom"] * 3) == "nystrom"
    assert shortest([*WWN, *WWN]) == shortest(WWN) == WWN
    assert shortest(["window", "nystrom", "window"]) == ("window", "nystrom", "window")
    with pytest.raises(ValueError, match="at least one name"):
        shortest([])
    assert (written("nystrom"), written(WWN)) == ("nystrom", "[window, window, nystrom]")
    assert pattern_of("window/window/nystrom") == WWN
    assert pattern_of("softmax") == "softmax"
    with pytest.raises(ValueError, match=r"no form of attention 'windows': did you mean 'window'\?"):
        pattern_of("windows/nystrom")


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_pattern_of_one_name_is_that_name_to_the_bit(objective: str) -> None:
    one, pattern = (case.config(objective=objective, attention=value) for value in ("nystrom", ["nystrom"] * 2))
    assert one == pattern
    assert one.model_dump_json() == pattern.model_dump_json()
    assert json.loads(one.model_dump_json())["attention"] == "nystrom"
    assert one.of_layer(1) is one
    models = []
    for config in (one, pattern):
        torch.manual_seed(0)
        models.append(build_model(config))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = case.tokens(2, 40)
    losses = [model(ids, labels=ids).loss_sum for model in models]
    assert torch.equal(*losses)


def test_a_run_keeps_a_pattern_as_a_list() -> None:
    config = run_config(attention=[*WWN, *WWN])
    assert yaml.safe_load(config.to_yaml())["model"]["attention"] == list(WWN)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    assert config.model_dump(mode="json")["model"]["attention"] == list(WWN)


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ([], r"an empty list gives the layers no form: name one, or a pattern as \[window, nystrom\]"),
        (["window", "nystrm"], r"there is no form of attention 'nystrm': did you mean 'nystrom'\?"),
        ([["window"], "nystrom"], "neither the name of a form nor a list of names"),
        (3, "3 is neither the name of a form nor a list of names"),
        (["window"] * 4 + ["nystrom"], r"attention \[window, .*\]: with num_layers 4 no layer has nystrom: give"),
    ],
)
def test_what_is_refused_and_where(attention: Any, words: str) -> None:
    with pytest.raises(UserError, match=r"model.*" + words):
        run_config(attention=attention, num_layers=4)


def test_a_layer_whose_form_does_not_suit_the_objective_is_refused() -> None:
    with FORMS.registered(type("CausalOnly", (Near,), {"name": "causal-only", "objectives": ("clm",)})):
        build_model(case.config(attention=["nystrom", "causal-only"], objective="clm"))
        with pytest.raises(UserError, match="causal-only is for objective clm, and this model has objective mlm"):
            build_model(case.config(attention=["nystrom", "causal-only"]))


def test_a_model_with_a_pattern_has_no_one_form() -> None:
    config = case.config(attention=["window", "nystrom"])
    for ask in (form_of, lambda config: attention_flops_per_token(config, 8)):
        with pytest.raises(ValueError, match="is a pattern: ask a layer for its form"):
            ask(config)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_flops_are_the_sum_over_the_layers(objective: str) -> None:
    config = case.config(attention=WWN, objective=objective, num_layers=5)
    for n in (3, 40, 500):
        each = [attention_flops_per_token(config.of_layer(number), n) for number in range(5)]
        assert len(set(each)) == (1 if n == 3 else 2)
        assert all_attention_flops_per_token(config, n) == pytest.approx(sum(each))
        whole = [forward_flops_per_token(config.of_layer(number), n) for number in range(5)]
        assert forward_flops_per_token(config, n) == pytest.approx(sum(whole) / 5)


def test_the_cache_is_the_sum_over_the_layers_and_a_window_keeps_its_size() -> None:
    config = case.config(attention=WWN, objective="clm", num_layers=5)
    for length in (8, 300):
        each = [cache_elements(config.of_layer(number), 3, length) // 5 for number in range(5)]
        assert cache_elements(config, 3, length) == sum(each)
    near, far = (cache_elements(config.of_layer(number), 1, 300) for number in (0, 2))
    assert near == cache_elements(config.of_layer(0), 1, 3000) < far < cache_elements(config.of_layer(2), 1, 3000)


def test_each_layer_has_the_parameters_of_its_own_form() -> None:
    config = case.config(attention=["nystrom", "window"], objective="clm", landmark_inverse=True)
    names = dict(build_model(config).named_parameters())
    assert "layers.0.attention.gamma_logit" in names
    assert "layers.1.attention.gamma_logit" not in names
