"""Folders of ``nystrom convert to-hf`` in transformers: same logits, same texts, wherever padding stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_case import bare_site, run_bare
from commands_case import next_commands
from form_case import EVERY
from hf_folder_case import _own_cache_of_modules, export, loaded_model, tokenizer  # noqa: F401

from data_pipeline.errors import UserError
from pretrain.convert.cli import main
from pretrain.convert.folder import cast, write_folder
from pretrain.model import Layout
from pretrain.model.beam import beam_search
from pretrain.model.generation import generate

transformers = pytest.importorskip("transformers")

WIDTH = 50
LENGTHS = [50, 3, 21, 34]


def load(folder: Path, kind: str, **options: Any) -> Any:
    return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, **options).eval()


def padded(side: str, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with anything in the padding, and the mask."""
    ids = torch.randint(5, vocabulary, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(seed))
    columns = torch.arange(WIDTH)
    sizes = torch.tensor(LENGTHS)[:, None]
    return ids, (columns < sizes if side == "right" else columns >= WIDTH - sizes).long()


KINDS = {"mlm": "AutoModelForMaskedLM", "clm": "AutoModelForCausalLM"}
BLOCKS = [
    {},
    {"norm": "post", "positions": "learned", "max_positions": 60, "conv_kernel": 9},
    {"positions": "none", "tie_embeddings": False, "conv_kernel": 0},
    {
        "ffn": "geglu", "norm_kind": "rmsnorm", "qk_norm": True, "bias": False, "positions": ["rotary", "none"],
        "residual_init": "scaled", "rope_scaling": "yarn", "rope_position_scale": 0.5, "rope_original_length": 16,
    },
]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("attention", "objective"), EVERY)
def test_logits_are_ours_with_padding_on_either_side(
    attention: str, objective: str, block: dict[str, Any], tmp_path: Path
) -> None:
    loaded = loaded_model(attention=attention, objective=objective, **block)
    theirs = load(export(loaded, tmp_path / "hf"), KINDS[objective]).double()
    loaded.model.double()
    for side in ("right", "left"):
        ids, mask = padded(side, tokenizer().vocab_size)
        with torch.no_grad():
            got = theirs(input_ids=ids, attention_mask=mask).logits
            whole = theirs(input_ids=ids).logits
            for row, real in enumerate(mask.bool()):
                expected = loaded.model(ids[row, real][None]).logits[0]
                torch.testing.assert_close(got[row, real], expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(whole, loaded.model(ids).logits, rtol=0, atol=0)


def test_losses_and_states(tmp_path: Path) -> None:
    for objective, kind in KINDS.items():
        loaded = loaded_model(objective=objective)
        theirs = load(export(loaded, tmp_path / objective), kind).double()
        loaded.model.double()
        ids, mask = padded("right", tokenizer().vocab_size)
        labels = torch.where(mask.bool(), ids, -100)
        out = theirs(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        shifted = labels if objective == "mlm" else torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        ours = loaded.model(ids, labels=shifted, layout=Layout.from_lengths(LENGTHS, WIDTH))
        torch.testing.assert_close(out.loss, ours.loss_sum / ours.num_targets)
        count = theirs(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss
        torch.testing.assert_close(count, ours.loss_sum / 7)
        assert len(out.hidden_states) == loaded.model_config.num_layers + 1
        base = load(tmp_path / objective, "AutoModel").double()(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(base.last_hidden_state, out.hidden_states[-1], rtol=0, atol=0)
        assert theirs(input_ids=ids, return_dict=False)[0].shape == (*ids.shape, tokenizer().vocab_size)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """Both in float64, where no rounding decides between two tokens."""
    loaded = loaded_model(objective="clm", init_std=0.5)
    folder = export(loaded, tmp_path_factory.mktemp("causal") / "hf")
    loaded.model.double()
    return loaded, load(folder, "AutoModelForCausalLM").double(), folder


PROMPTS = [[7, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [6]]


def left(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_texts_of_unequal_prompts_are_ours(causal: tuple[Any, Any, Path], use_cache: bool) -> None:
    loaded, theirs, _ = causal
    stop = loaded.tokenizer.eos_id
    ours = generate(loaded.model, PROMPTS, max_new_tokens=40, temperature=0, stop_id=stop)
    given = left(PROMPTS, loaded.tokenizer.pad_id)
    out = theirs.generate(**given, max_new_tokens=40, do_sample=False, use_cache=use_cache)
    for row, text in enumerate(ours):
        new = out[row, given["input_ids"].shape[1] :].tolist()
        assert new[: len(text)] == text
        assert all(token in (stop, loaded.tokenizer.pad_id) for token in new[len(text) :])


def test_layers_of_unlike_forms_decode_each_with_its_own_cache(tmp_path: Path) -> None:
    loaded = loaded_model(objective="clm", init_std=0.5, attention=["nystrom", "softmax"], num_layers=3)
    theirs = load(export(loaded, tmp_path / "hf"), "AutoModelForCausalLM").double()
    assert theirs.config.network["attention"] == ["nystrom", "softmax"]
    stop = loaded.tokenizer.eos_id
    (ours,) = generate(loaded.model.double(), PROMPTS[1:2], max_new_tokens=20, temperature=0, stop_id=stop)
    given = left(PROMPTS[1:2], loaded.tokenizer.pad_id)
    out = theirs.generate(**given, max_new_tokens=20, do_sample=False)
    assert out[0, len(PROMPTS[1]) :].tolist()[: len(ours)] == ours


def test_beams_are_ours(causal: tuple[Any, Any, Path]) -> None:
    loaded, theirs, _ = causal
    ours, log_p = beam_search(loaded.model, PROMPTS, beams=3, max_new_tokens=12, stop_id=loaded.tokenizer.eos_id)
    out = theirs.generate(
        **left(PROMPTS, loaded.tokenizer.pad_id),
        max_new_tokens=12,
        num_beams=3,
        early_stopping=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for row, text in enumerate(ours):
        assert out.sequences[row, 20 : 20 + len(text)].tolist() == text
        counted = len(text) + (len(text) < 12)
        assert float(out.sequences_scores[row]) == pytest.approx(log_p[row] / counted, abs=1e-6)


def test_a_sampled_text_has_the_logits_of_a_whole_pass(causal: tuple[Any, Any, Path]) -> None:
    loaded, theirs, _ = causal
    torch.manual_seed(1)
    given = left(PROMPTS, loaded.tokenizer.pad_id)
    out = theirs.generate(
        **given,
        max_new_tokens=30,
        do_sample=True,
        top_k=20,
        num_return_sequences=2,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(set(map(tuple, out.sequences[:2].tolist()))) == 2
    steps = torch.stack(out.logits, dim=1)
    for row in range(6):
        text = torch.tensor([PROMPTS[row // 2] + out.sequences[row, 20:].tolist()])
        with torch.no_grad():
            expected = loaded.model(text).logits[0, len(PROMPTS[row // 2]) - 1 : -1]
        torch.testing.assert_close(steps[row].double(), expected, rtol=1e-6, atol=1e-6)  # given in float32


def test_streaming_and_several_tokens_at_once(causal: tuple[Any, Any, Path]) -> None:
    _, theirs, _ = causal
    pieces: list[int] = []

    class Collect(transformers.generation.streamers.BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            pieces.append(-1)

    prompt = torch.tensor([PROMPTS[1]])
    out = theirs.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, streamer=Collect())
    assert pieces == [*out[0].tolist(), -1]
    with torch.no_grad():
        first = theirs(input_ids=out[:, :20], use_cache=True)
        rest = theirs(input_ids=out[:, 20:], past_key_values=first.past_key_values)
        whole = theirs(input_ids=out).logits
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, rtol=0, atol=1e-9)


def test_what_cannot_be_is_refused(causal: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, theirs, folder = causal
    ids, mask = padded("right", tokenizer().vocab_size)
    holes = mask.clone()
    holes[0, 5] = 0
    for options, said in (
        ({"attention_mask": holes}, "holes"),
        ({"attention_mask": mask[:, :-1]}, "shape"),
        ({"attention_mask": mask, "use_cache": True}, "pad them on the left"),
        ({"output_attentions": True}, "output_attentions"),
        ({"past_key_values": transformers.DynamicCache()}, "NystromCache"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=said):
            theirs(input_ids=ids, **options)
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        theirs(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="a cache of its own"):
        theirs.generate(ids[:1], max_new_tokens=2, cache_implementation="static")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    get_class = transformers.dynamic_module_utils.get_class_from_dynamic_module
    masked = get_class("modeling_nystrom.NystromForMaskedLM", str(folder))
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        masked(config)
    learned = loaded_model(objective="clm", positions="learned")
    short = load(export(learned, tmp_path / "learned"), "AutoModelForCausalLM")
    with pytest.raises(ValueError, match=f"{learned.model_config.max_positions} learned positions"):
        short(input_ids=ids.repeat(1, 11))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_number_formats(dtype: str, tmp_path: Path) -> None:
    loaded = loaded_model(objective="mlm")
    theirs = load(export(loaded, tmp_path / "hf", dtype=dtype), "AutoModelForMaskedLM")
    to = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {p.dtype for p in theirs.parameters()} == {to}
    ids, mask = padded("right", tokenizer().vocab_size)
    same = loaded_model(objective="mlm").model.to(to)
    with torch.no_grad():
        expected = same(ids, layout=Layout.from_lengths(LENGTHS, WIDTH)).logits
        got = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(UserError, match=r"a\.weight has values that fp16 cannot hold"):
        cast({"a.weight": torch.tensor([1e5])}, "fp16")


def test_shards_of_weights(tmp_path: Path) -> None:
    loaded = loaded_model(objective="clm")
    folder = export(loaded, tmp_path / "hf", max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert "model.layers.0.attention.query.weight" in index["weight_map"]
    theirs = load(folder, "AutoModelForCausalLM")
    ids, _ = padded("right", tokenizer().vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, loaded.model(ids).logits, rtol=0, atol=0)


def test_the_tokenizer_gives_the_ids_of_training(causal: tuple[Any, Any, Path], tmp_path: Path) -> None:
    loaded, _, folder = causal
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text in ("the king  of the sea,\nand more", " a", ""):
        assert theirs(text)["input_ids"] == loaded.tokenizer.encode(text)
    assert theirs.padding_side == "left"
    assert theirs.model_max_length == 64
    masked = loaded_model(objective="mlm")
    mlm = transformers.AutoTokenizer.from_pretrained(export(masked, tmp_path / "mlm"), trust_remote_code=True)
    encode = masked.tokenizer.encode
    assert mlm("the <mask> of")["input_ids"] == [*encode("the"), masked.tokenizer.mask_id, *encode(" of")]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint is a tiny causal one."""
    monkeypatch.setattr("pretrain.checkpoint.load.load_model", lambda path: loaded_model(objective="clm"))


@pytest.mark.usefixtures("found")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.convert.check.largest_difference", lambda *_, **__: None)
    out = tmp_path / "hf"
    assert main(["to-hf", "run", str(out), "--dtype", "bf16"]) == 0
    said, following = capsys.readouterr()
    assert next_commands(following) == [["push", str(out), "OWNER/hf", "--dry-run"]]
    assert "not compared: transformers is not installed here" in said
    assert f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)' in said
    with pytest.raises(UserError, match="exists already"):
        main(["to-hf", "run", str(out)])
    assert main(["to-hf", "run", str(out), "--overwrite", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["folder"], answer["class"], answer["largest_difference"]) == (str(out), "AutoModelForCausalLM", None)
    assert answer["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert "license: unknown" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="--max-shard-size 1XB"):
        main(["to-hf", "run", str(tmp_path / "other"), "--max-shard-size", "1XB"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--length", "64"], "--length is for --stock"),
        (["--stock", "--length", "0"], "at least 1 token"),
        (["--stock"], "model.objective is clm"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        main(["to-hf", "run", str(tmp_path / "hf"), *words])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("length", "dtype"), [(64, "fp32"), (64, "bf16"), (12, "fp16")])
def test_a_folder_for_stock_transformers(
    length: int, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With landmarks at 64 tokens; at 12 attention is exact."""
    block = {"norm": "post", "positions": "learned", "max_positions": 64, "inverse_init": "original"}
    monkeypatch.setattr("pretrain.checkpoint.load.load_model", lambda path: loaded_model(**block))
    out = tmp_path / "hf"
    assert main(["to-hf", "run", str(out), "--stock", "--length", str(length), "--dtype", dtype]) == 0
    said = re.search(r"largest difference of a logit (\S+)\n", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) < 1e-4
    card = (out / "README.md").read_text()
    assert ("computes" in card or "exact there" in card) if length == 12 else "must have exactly" in card


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="it is no folder of a model"):
        write_folder(tmp_path / "notes", lambda out: None, overwrite=True)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x"


@pytest.mark.slow
@pytest.mark.usefixtures("found")
def test_the_command_loads_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["to-hf", "run", "hf"]) == 0  # a relative path
    assert "largest difference of a logit 0\n" in capsys.readouterr().out
    monkeypatch.setattr("pretrain.convert.own.to_theirs", lambda weights: {n: 2 * w for n, w in weights.items()})
    with pytest.raises(UserError, match=r"the folder does not load|logits in transformers differ by"):
        main(["to-hf", "run", str(tmp_path / "wrong")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.slow
def test_the_programs_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "transformers.md"
    generating, filling = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    for objective in KINDS:
        export(loaded_model(objective=objective), tmp_path / "hf" / f"demo-{objective}")
    exec(compile(generating, page.name, "exec"), {})
    assert "def read_file(path):" in capsys.readouterr().out
    exec(compile(filling, page.name, "exec"), {})
    assert capsys.readouterr().out.count("'score'") == 5


BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
folder, kind = sys.argv[1:]
for name in ("pretrain", "data_pipeline", "deepspeed", "datasets"):
    try:
        __import__(name)
        raise SystemExit(name + " is here")
    except ModuleNotFoundError:
        pass
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = {"clm": AutoModelForCausalLM, "mlm": AutoModelForMaskedLM}[kind].from_pretrained(folder, trust_remote_code=True)
given = tokenizer(["the king of the sea", "a man"], return_tensors="pt", padding=True)
logits = model(**given).logits
print("sum", float(logits[given["attention_mask"].bool()].double().abs().sum()))
if kind == "clm":
    print("ids", model.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:].tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_torch_and_transformers_are_all_that_a_folder_needs(objective: str, tmp_path: Path) -> None:
    loaded = loaded_model(objective=objective)
    folder = export(loaded, tmp_path / "hf")
    said = run_bare(bare_site(tmp_path / "site", "torch", "transformers"), BARE, str(folder), objective)
    texts = [loaded.tokenizer.encode(text) for text in ("the king of the sea", "a man")]
    with torch.no_grad():
        total = sum(float(loaded.model(torch.tensor([ids])).logits.double().abs().sum()) for ids in texts)
    found = re.search(r"sum (\S+)", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(total, rel=1e-5)
    if objective == "clm":
        assert f"ids {generate(loaded.model, texts, max_new_tokens=5, temperature=0)}" in said
