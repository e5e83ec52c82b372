"""Every key of a block against a plain float64 reference, written here, and in every form of attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from form_case import (
    config,
    decoding_equals_the_forward_pass,
    every_length_reaches_every_parameter,
    logits,
    model_of,
    packed_equals_separate,
    padding_does_not_matter,
    tokens,
)
from pydantic import ValidationError
from torch import Tensor, nn

from pretrain.config import OptimizerConfig
from pretrain.model import ModelConfig, build_model
from pretrain.model.feed_forward import FEED_FORWARDS, FeedForwardKind
from pretrain.model.flops import all_attention_flops_per_token, forward_flops_per_token
from pretrain.model.layers import Block, reset_module
from pretrain.model.transformer import NystromformerLM
from pretrain.optim.optimizer import parameter_groups

MODERN: dict[str, Any] = {
    "ffn": "swiglu", "norm_kind": "rmsnorm", "qk_norm": True, "bias": False, "positions": ["rotary", "none"],
    "residual_init": "scaled",
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {},
    {"ffn": "geglu"},
    {"ffn": "swiglu", "intermediate_size": 20},
    {"ffn": "relu2"},
    {"norm_kind": "rmsnorm"},
    {"qk_norm": True},
    {"bias": False},
    {"positions": ["rotary", "none"]},
    {"norm": "post", "norm_kind": "rmsnorm", "ffn": "geglu"},
    MODERN,
]


def named(changes: dict[str, Any]) -> str:
    return "modern" if changes is MODERN else " ".join(map(str, changes.values())) or "published"


each_change = pytest.mark.parametrize("changes", CHANGES, ids=named)


class Reference:
    """The whole model with exact attention and no convolution, in the words of the papers."""

    def __init__(self, model: NystromformerLM) -> None:
        self.config, self.used = model.config, set[str]()
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def take(self, name: str) -> Tensor | None:
        self.used.add(name)
        return self.weights.get(name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.take(name + ".weight"), self.take(name + ".bias")
        assert weight is not None
        return x @ weight.T + (0 if bias is None else bias)

    def norm(self, name: str, x: Tensor, kind: str) -> Tensor:
        if kind == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        weight, bias = self.take(name + ".weight"), self.take(name + ".bias")
        assert weight is not None
        return x * weight + (0 if bias is None else bias)

    def attention(self, name: str, x: Tensor, positions: str) -> Tensor:
        c, n = self.config, x.shape[1]
        q, k, v = (
            self.linear(f"{name}.{part}", x).unflatten(-1, (c.num_heads, -1)) for part in ("query", "key", "value")
        )
        if c.qk_norm:
            q, k = self.norm(f"{name}.query_norm", q, "rmsnorm"), self.norm(f"{name}.key_norm", k, "rmsnorm")
        if positions == "rotary":
            angles = torch.arange(n).double()[:, None] * c.rope_theta ** -(
                torch.arange(0, c.head_dim, 2).double() / c.head_dim
            )
            turn = torch.polar(torch.ones_like(angles), angles)[:, None]
            q, k = (torch.complex(*part.chunk(2, -1)) * turn for part in (q, k))
            q, k = (torch.cat([part.real, part.imag], -1) for part in (q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(c.head_dim)
        if c.objective == "clm":
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        return self.linear(name + ".output", mixed)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        inner = self.linear(name + ".intermediate", x)
        if self.config.ffn == "gelu":
            hidden = gelu(inner)
        elif self.config.ffn == "relu2":
            hidden = inner.clamp(min=0) ** 2
        else:
            gate = self.linear(name + ".gate", x)
            hidden = inner * (gelu(gate) if self.config.ffn == "geglu" else gate / (1 + (-gate).exp()))
        return self.linear(name + ".output", hidden)

    def logits(self, ids: Tensor) -> Tensor:
        c = self.config
        words = self.take("embeddings.word_embeddings.weight")
        assert words is not None
        x = self.norm("embeddings.norm", words[ids], c.norm_kind)
        for i, positions in enumerate(c.positions_by_layer):
            at = f"layers.{i}."
            first, second = at + "attention_norm", at + "feed_forward_norm"
            if c.norm == "pre":
                x = x + self.attention(at + "attention", self.norm(first, x, c.norm_kind), positions)
                x = x + self.feed_forward(at + "feed_forward", self.norm(second, x, c.norm_kind))
            else:
                x = self.norm(first, x + self.attention(at + "attention", x, positions), c.norm_kind)
                x = self.norm(second, x + self.feed_forward(at + "feed_forward", x), c.norm_kind)
        x = self.norm("norm", x, c.norm_kind) if c.norm == "pre" else x
        if c.objective == "mlm":
            x = self.norm("head.norm", gelu(self.linear("head.dense", x)), c.norm_kind)
        bias = self.take("head.decoder.bias")
        return x @ words.T + (0 if bias is None else bias)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@each_change
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_equals_the_plain_reference(objective: str, changes: dict[str, Any]) -> None:
    model = model_of(objective=objective, attention="softmax", conv_kernel=0, **changes)
    reference, ids = Reference(model), tokens(2, 19)
    torch.testing.assert_close(logits(model, ids), reference.logits(ids), rtol=0, atol=1e-11)  # measured: 4e-14
    assert set(reference.weights) <= reference.used  # no weight beside


@each_change
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_gradients_reach_every_parameter_at_every_length(objective: str, changes: dict[str, Any]) -> None:
    model = model_of(objective=objective, **changes)
    for length in (1, 9, 40):
        every_length_reaches_every_parameter(model, length)


LANDMARKS = {"learn_landmark_query": True}
FORMS: list[dict[str, Any]] = [
    {"attention": "softmax"}, {"attention": "window"}, {"landmark_inverse": True, **LANDMARKS},
    {"landmark_levels": 4, "landmark_band": 2, "landmark_branching": 2, **LANDMARKS},
    {"attention": ["window", "nystrom"]},
]  # fmt: skip


@pytest.mark.parametrize(
    "changes", [*CHANGES[1:], *(MODERN | form for form in FORMS)], ids=lambda c: " ".join(map(str, c.values()))
)
def test_decoding_equals_the_forward_pass(changes: dict[str, Any]) -> None:
    decoding_equals_the_forward_pass(model_of(objective="clm", **changes))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_padding_and_packing_do_not_matter(objective: str) -> None:
    model = model_of(objective=objective, **MODERN)
    padding_does_not_matter(model)
    packed_equals_separate(model)


@each_change
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_flops_are_those_of_the_modules(objective: str, changes: dict[str, Any]) -> None:
    model = model_of(objective=objective, **changes)
    counted: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, _, out: counted.append(2 * out.numel() * m.in_features)  # bound at once
            )
    model(tokens(2, 24))
    c = model.config
    convolution = 2 * c.conv_kernel * c.hidden_size * c.num_layers
    attention = all_attention_flops_per_token(c, 24)
    assert sum(counted) == 48 * (forward_flops_per_token(c, 24, target_share=1.0) - attention - convolution)


@pytest.mark.parametrize("width", [32, 64, 192])
def test_gated_layers_have_the_parameters_of_plain_ones(width: int) -> None:
    plain, gated = (config(hidden_size=width, num_heads=2, ffn=ffn) for ffn in ("gelu", "swiglu"))
    assert plain.ffn_size == 4 * width
    assert gated.ffn_size % 16 == 0
    assert 8 * width**2 <= 3 * width * gated.ffn_size < 8 * width**2 + 3 * width * 16
    assert config(hidden_size=width, ffn="swiglu", intermediate_size=10).ffn_size == 10
    built = build_model(gated)
    assert sum(p.numel() for p in built.layers[0].feed_forward.parameters()) == gated.ffn_size * (3 * width + 2) + width


def test_a_further_kind_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEED_FORWARDS, "reglu", FeedForwardKind(lambda: torch.relu, gated=True))
    layer = model_of(ffn="reglu").layers[0].feed_forward
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.output(layer.gate(x).clamp(min=0) * layer.intermediate(x)))


# How weights begin.


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_weights_of_a_seed_are_those_of_earlier_versions(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(model: NystromformerLM) -> None:
        for module in model.modules():
            reset_module(module, model.config)
            if isinstance(module, Block) and norm == "pre":  # these two were drawn again when their turn came
                nn.init.normal_(module.attention.output.weight, std=0.1)
                nn.init.normal_(module.feed_forward.output.weight, std=0.1)

    torch.manual_seed(5)
    now = build_model(config(norm=norm)).state_dict()
    monkeypatch.setattr(NystromformerLM, "reset_parameters", before)
    torch.manual_seed(5)
    then = build_model(config(norm=norm)).state_dict()
    assert all(torch.equal(now[name], value) for name, value in then.items())


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_scaled_maps_into_the_residual_stream_and_no_others(norm: str) -> None:
    weights = []
    for kind in ("same", "scaled"):
        torch.manual_seed(5)
        weights.append(build_model(config(norm=norm, num_layers=8, hidden_size=64, residual_init=kind)).state_dict())
    for name, value in weights[0].items():
        if name.endswith("output.weight"):
            torch.testing.assert_close(weights[1][name], value / 4)  # sqrt(2 x 8)
            assert float(weights[1][name].std()) == pytest.approx(0.3 / 4, rel=0.05)
        else:
            assert torch.equal(weights[1][name], value), name


def test_gains_never_decay_and_muon_takes_the_gate() -> None:
    model = build_model(config(objective="clm", **MODERN))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        group["name"]: {names[id(p)] for p in group["params"]}
        for group in parameter_groups(model, OptimizerConfig(kind="muon"))
    }
    assert {name for name in names.values() if "norm" in name} <= groups["no_decay"]
    assert {"layers.0.attention.query_norm.weight", "norm.weight", "embeddings.norm.weight"} <= groups["no_decay"]
    ends = ("query", "key", "value", "attention.output", "gate", "intermediate", "feed_forward.output")
    assert groups["muon"] == {f"layers.{i}.{e}.weight" for i in (0, 1) for e in _within(ends)}


def _within(ends: tuple[str, ...]) -> list[str]:
    return [e if "." in e else f"{'feed_forward' if e in ('gate', 'intermediate') else 'attention'}.{e}" for e in ends]


# As data.


def test_a_configuration_reads_back_as_it_was_and_old_ones_mean_the_same() -> None:
    whole = config(**MODERN)
    assert ModelConfig.model_validate_json(whole.model_dump_json()) == whole
    assert [whole.of_layer(i).positions for i in range(4)] == ["rotary", "none", "rotary", "none"]
    assert config(positions=["rotary", "rotary"]) == config(positions=["rotary"]) == config()
    scaled = config(positions=["none", "rotary"], rope_scaling="linear", rope_position_scale=0.5)
    assert ModelConfig.model_validate(scaled.of_layer(0).model_dump()).positions == "none"
    new = {"ffn", "norm_kind", "qk_norm", "bias", "residual_init", "rope_original_length"}
    assert ModelConfig.model_validate(config().model_dump(exclude=new)) == config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": "maxout"}, "no feed-forward layer 'maxout': known: gelu, geglu, swiglu, relu2"),
        ({"norm_kind": "batchnorm"}, "no norm 'batchnorm': known: layernorm, rmsnorm"),
        ({"positions": "sine"}, "no positions 'sine': known: rotary, learned, none"),
        ({"positions": []}, "an empty list gives the layers no kind of positions"),
        ({"positions": ["learned", "none"]}, "write learned alone, or a list of rotary and none"),
        ({"positions": ["rotary"] * 3 + ["none"]}, "with num_layers 2 no layer has none"),
        ({"positions": ["rotary", "none"], "num_heads": 16}, "rotary positions need an even head width"),
        ({"positions": "none", "rope_scaling": "yarn"}, "rope_scaling yarn has no effect with positions: none"),
        ({"rope_original_length": 64}, "rope_original_length 64 has no effect with rope_scaling: none"),
        ({"rope_scaling": "yarn", "rope_position_scale": 0.5}, "needs rope_original_length"),
        ({"rope_scaling": "yarn", "rope_theta": 1.0}, "needs a rope_theta above 1"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)
