"""Text as it grows is the text of the whole, and never half a character."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from eval.shell.stream import CUT, Detokenizer, InOrder, TextStream, byte_tokens

TEXT = "The naïve café: 日本語 и 😀😀 end. " * 3


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return train_tokenizer(["plain words only"] * 5, 300)  # so that other characters are in several tokens


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """As SentencePiece has it: a leading space that is dropped, and bytes for unknown characters."""
    names = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocabulary, merges = {name: i for i, name in enumerate(names)}, [("▁", "a"), ("▁", "b")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    return Tokenizer(backend)


def pieces(tokenizer: Tokenizer, prompt: list[int], new: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(Detokenizer(tokenizer), prompt, stops)
    out = []
    for token in new:
        out.append(stream.push(token))
        if stream.stopped:
            break
    out.append(stream.finish())
    assert "".join(out) == stream.text
    return out


def test_characters_of_several_tokens_come_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TEXT)
    assert len(ids) > len(TEXT)
    found = pieces(byte_level, byte_level.encode("before "), ids)
    assert "".join(found) == TEXT
    assert not any(CUT in piece for piece in found)
    assert {"日", "😀", "é"} <= set(found)


@pytest.mark.parametrize("name", ["byte_level", "fallback"])
def test_any_tokens_stream_to_the_decoding_of_the_whole(name: str, request: pytest.FixtureRequest) -> None:
    """Also bytes that are no text, cut characters and special tokens, as a model that has learnt nothing writes."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    for _ in range(60):
        weighted = [*tokenizer.encode("日é"), *range(tokenizer.vocab_size)]
        ids = [rng.choice(weighted[:6] if rng.random() < 0.5 else weighted) for _ in range(rng.randint(1, 30))]
        prompt = ids[: rng.randint(0, 12)]
        new = ids[len(prompt) :]
        whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
        text = "".join(pieces(tokenizer, prompt, new))
        assert text == Detokenizer(tokenizer).text(prompt, new)
        if len(prompt) <= 8:
            assert text == (whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new))


def test_the_space_before_the_first_word_is_kept(fallback: Tokenizer) -> None:
    a, b = (fallback.encode(word)[-1] for word in "ab")
    assert fallback.decode([b]) == "b"
    assert pieces(fallback, [a], [b, a]) == [" b", " a", ""]


def test_a_run_of_byte_tokens_waits_for_its_end(fallback: Tokenizer) -> None:
    [*_, first, second, third] = fallback.encode("日")
    assert {first, second, third} <= byte_tokens(fallback)
    a = fallback.encode("a")[-1]
    assert pieces(fallback, [a], [first, second, third, a]) == ["", "", "", "日 a", ""]
    # A wrong byte behind a whole character makes the decoder write all of the run as wrong.
    assert "".join(pieces(fallback, [a], [first, second, third, first, a])) == CUT * 4 + " a"


def test_a_stop_ends_the_text_before_it(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("one two three")
    whole = pieces(byte_level, [], ids, ("two",))
    assert "".join(whole) == "one "
    assert len(whole) < len(ids)
    assert "".join(pieces(byte_level, [], ids, ("twin", "three", "e t"))) == "on"
    assert "".join(pieces(byte_level, [], ids, ("threes", "x"))) == "one two three"  # begun and not ended


def test_a_stop_at_held_back_characters_counts_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a日")[:-1]
    stream = TextStream(Detokenizer(byte_level), [], ("b", CUT))
    assert "".join(map(stream.push, ids)) + stream.finish() == "a"
    assert stream.stopped


def test_texts_come_one_after_another() -> None:
    log: list[str] = []
    order = InOrder(3, lambda i: log.append(f"begin {i}"), log.append, lambda i: log.append(f"end {i}"))
    order.add(0, "a")
    order.add(1, "x")
    order.add(2, "z")
    order.finish(2)
    order.add(1, "y")
    order.add(0, "b")
    order.finish(0)
    order.add(1, "w")
    order.finish(1)
    assert log == ["begin 0", "a", "b", "end 0", "begin 1", "xy", "w", "end 1", "begin 2", "z", "end 2"]
    InOrder(0, lambda i: log.append("no"), log.append, lambda i: log.append("no"))
    assert "no" not in log
