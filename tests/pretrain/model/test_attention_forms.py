"""The seam for attention forms: what must hold of each, what is refused, and two toys that walk it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import form_case as case
import pytest
import torch
import toy_forms
from toy_forms import Near, Sink

from data_pipeline.errors import UserError
from data_pipeline.registry import RegistrationError
from pretrain.config import parse_config
from pretrain.model import ModelConfig, build_model
from pretrain.model.attention import forms
from pretrain.model.attention.form import Form
from pretrain.model.attention.pattern import Attention
from pretrain.model.attention.registry import FORMS, form_of
from pretrain.model.transformer import NystromformerLM
from pretrain.planning.estimate import parameters_by_part

EVERY_FORM: list[Callable[[NystromformerLM], None]] = [
    case.batch_mates_do_not_matter,
    case.padding_does_not_matter,
    case.packed_equals_separate,
    case.gradients_packed_equal_separate,
    case.exact_up_to_what_it_says,
    case.compiles_to_one_graph,
    lambda model: case.flops_are_sane(model.config),
    *(lambda model, n=n: case.every_length_reaches_every_parameter(model, n) for n in (1, 4, 5, 37)),
]
CAUSAL_FORMS: list[Callable[[NystromformerLM], None]] = [
    *(lambda model, kind=kind: case.no_gradient_from_the_future(model, kind) for kind in ("full", "documents")),
    case.the_future_changes_nothing_and_prefixes_agree,
    case.decoding_equals_the_forward_pass,
    lambda model: case.the_cache_has_the_size_it_says(model.config),
]
registered_forms = pytest.mark.parametrize(("attention", "objective"), case.REGISTERED)
every_form = pytest.mark.parametrize(("attention", "objective"), case.EVERY)
toys = pytest.mark.parametrize("toy", [Near, Sink])


@pytest.fixture
def known() -> Iterator[None]:
    with FORMS.registered(Near, Sink):
        yield


# The other properties are tested over the registry, with more kinds of models, in test_model.py and test_decoding.py.
@every_form
def test_exact_up_to_what_it_says(attention: Attention, objective: str) -> None:
    case.exact_up_to_what_it_says(case.model_of(attention=attention, objective=objective))


@every_form
def test_flops_are_sane(attention: Attention, objective: str) -> None:
    case.flops_are_sane(case.config(attention=attention, objective=objective))
    case.flops_are_sane(case.config(attention=attention, objective=objective, landmark_inverse=False))


@registered_forms
def test_settings_are_keys_of_the_configuration_and_the_only_ones_it_reads(attention: str, objective: str) -> None:
    own = form_of(case.config(attention=attention, objective=objective)).settings
    assert set(own) <= set(ModelConfig.model_fields)
    assert len(set(own)) == len(own)


@toys
@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.usefixtures("known")
def test_a_toy_has_every_property(toy: type, objective: str) -> None:
    model = case.model_of(attention=toy.name, objective=objective, positions="rotary")
    for check in [*EVERY_FORM, *(CAUSAL_FORMS if objective == "clm" else [])]:
        check(model)


@pytest.mark.usefixtures("known")
def test_own_parameters_are_built_named_counted_and_decoded_in_their_module() -> None:
    config = case.config(attention="sink", objective="clm")
    model = build_model(config)
    assert [name for name, _ in model.named_parameters() if "sink" in name] == [
        "layers.0.attention.sink", "layers.1.attention.sink"
    ]  # fmt: skip
    torch.testing.assert_close(model.layers[0].attention.sink, torch.ones(2))
    assert sum(parameters_by_part(config).values()) == model.num_parameters()
    attention = model.layers[0].attention
    attention.change_form(case.config(attention="softmax", objective="clm"))
    assert "sink" not in dict(attention.named_parameters())
    with pytest.raises(ValueError, match="attention sink needs sink, which the weights do not have"):
        attention.change_form(config)


def test_checks_would_fail_for_a_form_that_leaks_or_forgets() -> None:
    """Else a toy's passing would say nothing."""

    class Leaking(Near):
        name = "leaking"

        def attend(self, q: Any, k: Any, v: Any, rectangle: Any, given: Any) -> Any:
            return super().attend(q, k, v, rectangle, given) + 0.01 * v.mean(2, keepdim=True)

    class Forgetting(Near):
        name = "forgetting"

        def cache(self, max_length: int) -> Any:
            return form_of(self.config.model_copy(update={"attention": "softmax"})).cache(max_length)

    with FORMS.registered(Leaking, Forgetting):
        leaking, forgetting = (case.model_of(attention=name, objective="clm") for name in ("leaking", "forgetting"))
        for check in CAUSAL_FORMS[:4]:
            with pytest.raises(AssertionError):
                check(leaking)
        case.no_gradient_from_the_future(forgetting, "full")
        with pytest.raises(AssertionError):
            case.decoding_equals_the_forward_pass(forgetting)
    assert "leaking" not in FORMS.names()


def test_a_form_without_a_part_is_refused_by_name() -> None:
    lacking = r"form of attention 'half' .* lacks cache .*; exact_up_to .*; parameters "
    with pytest.raises(RegistrationError, match=lacking) as error:

        @FORMS.register
        class Half(Form):
            name = "half"
            far = "exact"
            attend = Near.attend
            flops = Near.flops

    assert "attend" not in str(error.value).replace("the attention itself", "")
    assert "half" not in FORMS.names()
    with pytest.raises(RegistrationError, match=r"form of attention 'Nameless' .* lacks name .*; far "):
        FORMS.register(type("Nameless", (Form,), {}))
    with pytest.raises(RegistrationError, match="form of attention 'softmax' is registered twice"):
        FORMS.register(type("Other", (Near,), {"name": "softmax"}))


def test_a_form_for_one_objective_is_refused_for_the_other() -> None:
    with FORMS.registered(type("CausalOnly", (Near,), {"name": "causal-only", "objectives": ("clm",)})):
        build_model(case.config(attention="causal-only", objective="clm"))
        with pytest.raises(UserError, match="causal-only is for objective clm, and this model has objective mlm"):
            build_model(case.config(attention="causal-only", objective="mlm"))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no form of attention 'windows': did you mean 'window'\? known: nystr"):
        case.config(attention="windows")
    with pytest.raises(UserError, match=r"model\.attention: there is no form of attention 'xyz': known: nystr"):
        parse_config({"name": "x", "model": {"attention": "xyz"}, "data": {"train": "x"}})
    with pytest.raises(ValueError, match="no form of attention 'xyz'"):
        form_of(case.config().model_copy(update={"attention": "xyz"}))
    assert {"nystrom", "softmax", "window"} <= set(FORMS.names())
    for name in FORMS.names():
        assert FORMS.get(name).name == name


def test_a_file_in_the_folder_is_all_that_a_form_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        inspect.getsource(toy_forms).replace('"near"', '"dropped"').replace("class Near", "@FORMS.register\nclass Near")
    )
    imported = "from pretrain.model.attention.registry import FORMS\n"
    source = source.replace(
        "from pretrain.model.attention.ring import", imported + "from pretrain.model.attention.ring import"
    )
    (tmp_path / "dropped.py").write_text(source)
    (tmp_path / "empty.py").write_text('"""Registers nothing."""\n')
    monkeypatch.setattr(forms, "__path__", [*forms.__path__, str(tmp_path)])
    with FORMS.registered():
        FORMS.refresh()
        model = case.model_of(attention="dropped", objective="clm")
        case.the_future_changes_nothing_and_prefixes_agree(model)
        case.decoding_equals_the_forward_pass(model)
        with pytest.raises(
            RegistrationError, match=r"module .*forms.empty registers no form of attention called 'empty'"
        ):
            build_model(case.config(attention="empty"))
    for name in ("dropped", "empty"):
        sys.modules.pop(f"{forms.__name__}.{name}", None)


def test_a_configuration_is_read_without_torch() -> None:
    """A command's ``--help`` and its typing errors must not wait for it."""
    code = (
        "import sys; from pretrain.config import RunConfig; from pretrain.model import ModelConfig\n"
        "ModelConfig(attention='window'); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
