"""What is made of the documents that lm-eval logs: choices, chance, ties, groups, and no figure over unlike tasks."""

from __future__ import annotations

from typing import Any

import pytest

from eval.results.statistics import estimate
from eval.tasks.harness import HarnessSettings
from eval.tasks.harness.documents import Sample, chance, choices_of, facts, shown
from eval.tasks.harness.outcome import outcome


def choice(number: int, log_p: list[float], right: Any = 0, **changes: Any) -> Sample:
    """A document of a multiple choice as lm-eval logs it; ``acc`` is what it computes: the first of the likeliest."""
    places = right if isinstance(right, list) else [right]
    return {
        "doc_id": number, "doc_hash": f"d{number}", "prompt_hash": "p", "target_hash": "t", "filter": "none",
        "arguments": [("Which one?", f" {'abcd'[i]}_{i}") for i in range(len(log_p))], "target": right,
        "filtered_resps": [(value, False) for value in log_p], "acc": float(log_p.index(max(log_p)) in places),
    } | changes  # fmt: skip


def found_of(samples: dict[str, list[Sample]], groups: dict[str, list[str]] | None = None) -> Any:
    """What lm-eval's ``evaluate`` returns, with the mean of ``acc``; of a group the mean over all documents."""
    results = {}
    for name, members in {**{task: [task] for task in samples}, **(groups or {})}.items():
        values = [sample["acc"] for task in members for sample in samples[task]]
        results[name] = {"alias": name, "acc,none": sum(values) / len(values), "acc_stderr,none": "N/A"}
    about = {"higher_is_better": {name: {"acc": True} for name in results}, "n-shot": dict.fromkeys(results, 0)}
    return {"results": results, "samples": samples, "group_subtasks": groups or {}, **about}


def test_the_likeliest_choice_is_taken_and_of_several_the_first() -> None:
    choices = choices_of(choice(0, [-3.0, -1.0, -1.0], right=2))
    assert choices is not None
    assert (choices.chosen, choices.tied, choices.chance) == (1, True, 1 / 3)
    assert facts(choice(0, [-3.0, -1.0, -2.0], right=[0, 2])) == {
        "log_likelihoods": [-3.0, -1.0, -2.0], "predicted": 1, "right": [0, 2], "tied": 0,
    }  # fmt: skip
    # Behind the choices, the same without a context; a right answer by its text; one that nobody knows.
    doubled = choice(0, [-3.0, -1.0, -9.0, -0.5], right=1, acc_mutual_info=1.0)
    assert facts(doubled)["log_likelihoods"] == [-3.0, -1.0]
    assert facts(choice(0, [-3.0, -1.0], right="b_1"))["right"] == [1]
    assert facts(choice(0, [-3.0, -1.0], right="x"))["right"] is None
    # In the prompt, what is asked for behind it the same.
    inside = choice(0, [-3.0, -1.0], right="end", arguments=[("A one", " end"), ("A two", " end")])
    assert choices_of(inside).texts == ["A one", "A two"]  # type: ignore[union-attr]
    written = {"filtered_resps": ["Paris"], "target": "paris", "arguments": [("Where?", {"until": []})]}
    assert facts(written) == {"predicted": "Paris", "right": "paris"}
    assert facts({"filtered_resps": [(-2.0, True)], "target": ""}) == {"log_likelihood": -2.0, "likeliest": 1}
    assert facts({"filtered_resps": [-2.0], "target": ""}) == {"log_likelihood": -2.0}


def test_chance_is_that_of_guessing_a_choice() -> None:
    samples = [choice(0, [-1.0, -2.0]), choice(1, [-1.0, -2.0, -3.0, -4.0], right=[1, 2])]
    assert chance(samples, "acc") == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert chance([sample | {"acc_norm": 1.0} for sample in samples], "acc_norm") == 0.5
    assert chance([sample | {"acc": 0.3} for sample in samples], "acc") is None  # a share of probability
    assert chance([sample | {"acc": 1.0 - sample["acc"]} for sample in samples], "acc") is None  # something else
    assert chance([sample | {"f1": 1.0} for sample in samples], "f1") is None
    assert chance([{"filtered_resps": [(-2.0, True)], "acc": 1.0}], "acc") is None


def test_samples_show_the_choices() -> None:
    """They read "responses -100.3, no, -101.0, no"."""
    (about,) = shown("toy", [choice(0, [-100.3, -101.0], right=1)])
    assert about == {
        "kind": "harness", "task": "toy", "prompt": "Which one?",
        "choices": {"a_0": "log p -100.30, chosen", "b_1": "log p -101.00, right"},
    }  # fmt: skip
    twice = choice(0, [-1.0, -1.0], arguments=[("Which?", " same"), ("Which?", "same ")])
    assert list(next(shown("toy", [twice]))["choices"]) == ["same", "same (again, 2)"]


def test_no_figure_is_over_unlike_tasks_and_ties_are_told() -> None:
    first = [choice(i, [-1.0, -1.0 - i % 2], right=i % 2) for i in range(6)]  # each second one tied
    second = [choice(i, [-1.0, -2.0, -3.0], right=i % 3) for i in range(9)]
    whole = outcome(found_of({"one": first, "two": second}, {"both": ["one", "two"]}), HarnessSettings())
    assert "acc" not in whole.metrics
    assert whole.metrics["one acc"].value == 0.5
    assert whole.metrics["two acc"].value == pytest.approx(1 / 3)
    assert (whole.metrics["one chance"].value, whole.metrics["two chance"].value) == (0.5, pytest.approx(1 / 3))
    assert (whole.metrics["one ties"].value, whole.metrics["two ties"].value) == (0.5, 0.0)
    assert whole.metrics["one ties"].over == "6 documents"
    assert "one: 3 of 6 documents (50.0%) have several likeliest choices. The first of " in whole.tables[0].note
    assert "as lm-eval does, and is right in 3." in whole.tables[0].note
    assert "two: " not in whole.tables[0].note
    # The group is lm-eval's own, and over all documents: it has an interval and can be compared in pairs.
    group = whole.metrics["both acc"]
    assert (group.value, group.over) == (pytest.approx(6 / 15), "15 documents")
    assert group.low is not None
    assert group.low < 6 / 15
    assert set(whole.estimators) == {"one acc", "two acc", "both acc"}
    for name, estimator in whole.estimators.items():
        assert estimate(whole.records, estimator) == pytest.approx(whole.metrics[name].value)
    assert [row[:2] + row[5:7] for row in whole.tables[0].rows] == [
        ["one", "acc", 0.5, 6], ["two", "acc", pytest.approx(1 / 3), 9], ["both", "acc", None, 15],
    ]  # fmt: skip
    unlike = found_of({"one": first, "two": second}, {"both": ["one", "two"]})
    unlike["results"]["both"]["acc,none"] = 5 / 12  # the mean of the tasks, not of the documents
    assert outcome(unlike, HarnessSettings()).metrics["both acc"].low is None
    alone = outcome(found_of({"one": first}), HarnessSettings())
    assert set(alone.metrics) == {"acc", "chance", "ties"}
    assert {record["task"] for record in alone.records} == {"one"}
