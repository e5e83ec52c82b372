"""The rules of a first configuration, against their sources and over many corpora and machines."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from pretrain.config import parse_config
from pretrain.curriculum.plan import build_plan, check_world_size
from pretrain.firstrun import rules
from pretrain.firstrun.choose import STEP_SECONDS, Draft, draft, drafts, seconds_per_token, settings, validations
from pretrain.firstrun.inputs import TAKEN_FOR, Corpus, Machine, gpus
from pretrain.firstrun.rules import SHAPES, Shape
from pretrain.machine import PEAK_FLOPS


def corpus(tokens: int, p90: int = 600, vocab_size: int = 8192, held_out: int | None = 100_000) -> Corpus:
    valid = None if held_out is None else "shards/valid"
    return Corpus("shards/train", tokens, max(1, tokens // 300), vocab_size, p90 // 2, p90, valid, held_out)


def machine(flops: float, hours: float, processes: int = 1) -> Machine:
    return Machine(processes, 80.0, flops, hours, True, "made up")


def test_the_predicted_loss_is_that_of_the_paper() -> None:
    # Fresh text and no more parameters than it is enough for: the plain law, 521 / N^0.353 + 1488 / D^0.353 + 1.87.
    assert rules.predicted_loss(1e8, 1e10, 1e10) == pytest.approx(1.87 + 521 / 1e8**0.353 + 1488 / 1e10**0.353)
    # Four passes are worth 3.73 times the text, section 3.1 with R* = 15.4.
    worth = 1e10 * (1 + 15.4 * (1 - math.exp(-3 / 15.4)))
    assert round(worth / 1e10, 2) == 3.73
    repeated = rules.predicted_loss(1e8, 4e10, 1e10)
    assert repeated == pytest.approx(1.87 + 521 / 1e8**0.353 + 1488 / worth**0.353)
    assert rules.predicted_loss(1e8, 4e10, 4e10) < repeated < rules.predicted_loss(1e8, 1e10, 1e10)


@pytest.mark.parametrize("flops", [1e16, 1e19, 1e22])
def test_with_text_to_spare_twenty_tokens_a_parameter_are_best(flops: float) -> None:
    sizes = [1e5 * 1.01**i for i in range(1500)]
    best = min(sizes, key=lambda n: rules.predicted_loss(n, flops / (6 * n), 1e30))
    assert flops / (6 * best) / best == pytest.approx(20, rel=0.05)


def test_more_parameters_than_the_text_is_enough_for_help_ever_less() -> None:
    losses = [rules.predicted_loss(n, 4e6, 1e6) for n in (5e4, 5e5, 5e6, 5e7, 5e8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-2] - losses[-1] < 1e-6 < losses[0] - losses[1]


def test_batch_and_learning_rate_are_those_of_the_paper() -> None:
    # C = 1e22: 0.2920 C^0.3271 = 4.6 million tokens and 0.3118 C^-0.1250 = 5.5e-4.
    flops = 1e22
    assert rules.wanted_batch(flops, 1e30) == 2**22
    assert math.log2(0.2920 * flops**0.3271) == pytest.approx(22, abs=0.5)
    assert rules.learning_rate(flops, "clm") == pytest.approx(0.3118 * flops**-0.125, rel=0.01)
    assert rules.learning_rate(flops, "mlm") == pytest.approx(rules.learning_rate(flops, "clm") / 2, rel=0.02)
    # What this project's own runs have: configs/books-clm.yaml is 5 million parameters and 2 million tokens.
    books = 6 * 5.2e6 * 2e6
    assert rules.wanted_batch(books, 1e30) == 8192
    assert rules.learning_rate(books, "clm") == rules.learning_rate(books, "mlm") == 2e-3


def test_a_short_run_gets_a_smaller_batch() -> None:
    assert rules.wanted_batch(1e18, 1e6) == 2048  # 488 steps, where the rule alone has 2^18 tokens


@pytest.mark.parametrize(
    ("p90", "batch", "processes", "text", "length"),
    [
        (600, 1 << 20, 8, 10**9, 1024),  # by the documents
        (1024, 1 << 20, 8, 10**9, 1024),  # one that just fits
        (1025, 1 << 20, 8, 10**9, 2048),
        (434_723, 1 << 20, 8, 10**9, 8192),  # books: within reason
        (434_723, 8192, 2, 10**9, 1024),  # eight rows in a batch
        (434_723, 8192, 64, 10**9, 128),  # a row for each process
        (5000, 1 << 20, 1, 3000, 512),  # little text
        (3, 1 << 20, 1, 10**9, 64),
    ],
)
def test_the_longest_rows(p90: int, batch: int, processes: int, text: int, length: int) -> None:
    assert rules.longest_length(p90, batch, processes, text) == length


def test_stages_are_those_of_the_measured_curriculum() -> None:
    assert rules.lengths_up_to(1024) == (256, 512, 1024)
    assert rules.lengths_up_to(64) == (64,)
    ends = rules.stage_ends(2_000_000, 8192, (256, 512, 1024))
    assert [round(end / 2_000_000, 2) for end in ends] == [0.49, 0.75, 1.0]
    assert all(end % 32_768 == 0 for end in ends)
    assert rules.stage_ends(1000, 8192, (256, 512, 1024)) == (32_768, 65_536, 98_304)  # none is empty


def test_sizes_grow_and_their_heads_have_even_widths() -> None:
    for smaller, larger in itertools.pairwise(SHAPES):
        assert 1.2 < larger.parameters(0) / smaller.parameters(0) < 6
    for shape in SHAPES:
        assert shape.hidden_size % shape.num_heads == 0
        assert shape.hidden_size // shape.num_heads in (32, 64, 128)


@pytest.mark.parametrize(("memory", "name"), [(8, "T4"), (24, "L4"), (40, "A100"), (79.2, "A100"), (141, "H200")])
def test_a_gpu_without_a_name_is_taken_for_a_slow_one_of_its_memory(memory: float, name: str) -> None:
    assert gpus(1, memory, 1, 0.3).gpu == name
    assert "assumed from the memory" in gpus(1, memory, 1, 0.3).speed
    assert all(each in PEAK_FLOPS for _, each in TAKEN_FOR)
    assert gpus(1, memory, 1, 0.3, "h100").flops == 0.3 * PEAK_FLOPS["H100"]
    assert gpus(1, memory, 1, 0.5, None, 2e14).flops == 1e14


def cases(count: int) -> list[tuple[str, Corpus, Machine]]:
    """Corpora and machines drawn over many orders of magnitude."""
    draw = random.Random(0)
    out = []
    for _ in range(count):
        text = corpus(
            tokens=int(10 ** draw.uniform(5, 13)),
            p90=int(10 ** draw.uniform(0.5, 6)),
            vocab_size=draw.choice([300, 4096, 32_768, 128_000]),
            held_out=draw.choice([None, 2000, 10**6]),
        )
        on = machine(10 ** draw.uniform(10, 15), 10 ** draw.uniform(-1, 3), draw.choice([1, 2, 3, 6, 8, 24, 512]))
        out.append((draw.choice(["clm", "mlm"]), text, on))
    return out


@pytest.mark.parametrize("part", range(4))
def test_whatever_is_drafted_is_a_run(part: int) -> None:
    """Each size that the rules allow is a valid configuration that the processes can share, within text and time."""
    found = 0
    for objective, text, on in cases(200)[part::4]:
        each: Draft | None
        for shape in (SHAPES[0], SHAPES[4], SHAPES[9], SHAPES[-1]):
            each = draft(shape, objective, text, on)
            if each is None:
                continue
            found += 1
            config = parse_config(settings("run", objective, each, text, on, (1,) * len(each.lengths), 1, False))
            plan = build_plan(config)
            check_world_size(plan, on.processes)
            assert plan.total_tokens == each.tokens  # nothing was rounded
            # One window at most above what the time and the text allow.
            window = each.batch * each.lengths[-1] // each.lengths[0]
            assert each.tokens <= rules.EPOCHS * text.tokens + 3 * window
            assert each.flops_per_token * (each.tokens - 3 * window) <= on.processes * on.flops * on.hours * 3600
            assert plan.num_batches >= rules.LEAST_STEPS - 1
            assert each.lengths[-1] <= min(text.tokens, text.held_out or text.tokens)
            assert 0 < config.schedule.warmup_tokens < each.tokens - (config.schedule.decay_tokens or 0)
    assert found


def test_more_time_and_more_text_never_give_a_smaller_model() -> None:
    def size(hours: float, tokens: int) -> int:
        return drafts("clm", corpus(tokens), machine(1e14, hours))[0].shape.parameters(8192)

    by_time = [size(hours, 10**11) for hours in (0.1, 1, 10, 100)]
    by_text = [size(10, tokens) for tokens in (10**6, 10**7, 10**9)]
    assert by_time == sorted(set(by_time))
    assert by_text == sorted(set(by_text))


def test_a_step_takes_time_beside_its_arithmetic() -> None:
    on = machine(1e14, 1)
    assert seconds_per_token(1e6, 10**9, on) == pytest.approx(1e-8, rel=0.01)
    assert seconds_per_token(1e6, 512, on) == pytest.approx(STEP_SECONDS / 512, rel=0.01)


@pytest.mark.parametrize(("tokens", "count"), [(10**5, 2), (10**6, 12), (10**7, 20), (10**11, 20)])
def test_validations_of_a_short_run_are_few(tokens: int, count: int) -> None:
    assert validations(tokens) == count


def test_what_ends_the_run_is_told() -> None:
    assert drafts("clm", corpus(10**11), machine(1e14, 1))[0].limited_by == "time"
    small = drafts("clm", corpus(10**6), machine(1e14, 24))[0]
    assert small.limited_by == "text"
    assert small.tokens <= 4 * 10**6
    assert small.shape.parameters(8192) < 10**7  # a large model would only memorise it


def test_a_day_of_eight_large_gpus() -> None:
    """About what an expert would take: 5e19 FLOP, hundreds of millions of parameters, a batch of a million tokens."""
    run = drafts("clm", corpus(10**10, vocab_size=32_768, held_out=5 * 10**6), gpus(8, 80, 24, 0.3))[0]
    assert run.shape == Shape(1280, 24, 20)
    assert 20 < run.tokens / run.shape.parameters(32_768) < 40
    assert run.batch == 1 << 20
    assert rules.learning_rate(run.flops, "clm") == 1.1e-3
