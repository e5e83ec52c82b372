"""Stock lm-eval on a folder of ``nystrom convert to-hf``, by the commands of docs/lm-eval.md, and ``nystrom eval``.

lm-eval runs where this project is not installed. One process does all of its runs: its imports take most of the time.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare_case import bare_site, run_bare
from suites_case import WORDS

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.results.records import read_records
from eval.results.schema import read_result
from eval.tasks.harness.documents import identity
from launch import program

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "lm-eval.md").read_text(encoding="utf-8")
TASKS = ("my_questions", "my_words", "my_texts", "my_answers")
WINDOW = 64
REST = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: my_tasks/examples.jsonl, test: my_tasks/questions.jsonl}}}}
output_type: {kind}
test_split: test
doc_to_text: "{text}"
doc_to_target: "{target}"
generation_kwargs: {{until: ["%", "st"], max_gen_toks: 12}}
metric_list: [{metrics}]
"""
FILES = {
    "my_words": {
        "kind": "loglikelihood", "text": "{{context}}", "target": "{{word}}",
        "metrics": "{metric: perplexity, aggregation: perplexity, higher_is_better: false}, "
        "{metric: acc, aggregation: mean, higher_is_better: true}",
    },
    "my_texts": {
        "kind": "loglikelihood_rolling", "text": "", "target": "{{prompt}}",
        "metrics": "{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}",
    },
    "my_answers": {
        "kind": "generate_until", "text": "{{prompt}}", "target": "{{word}}",
        "metrics": "{metric: exact_match, aggregation: mean, higher_is_better: true}",
    },
}  # fmt: skip
# Runs the command of the page, and then lm-eval's own function with other settings, without its thousands of tasks.
DRIVER = """
import json, runpy, sys
words, settings, out = map(json.loads, sys.argv[1:])
sys.argv = words
try:
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
import lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path="my_tasks", include_defaults=False)
seeds = dict.fromkeys(["random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"], 0)
for name, options in settings.items():
    found = lm_eval.simple_evaluate("hf", task_manager=manager, device="cpu", bootstrap_iters=0, **seeds, **options)
    keys = ["doc_id", "doc_hash", "prompt_hash", "target_hash", "filtered_resps"]
    samples = {task: [{k: s[k] for k in keys} for s in rows] for task, rows in found["samples"].items()}
    with open(f"{out}/{name}.json", "w") as file:
        json.dump({"results": found["results"], "samples": samples}, file)
try:
    lm_eval.api.registry.get_model("hf")("hf/demo-mlm", trust_remote_code=True, device="cpu")
except ValueError as error:
    print(error)
"""
FOLDER = "pretrained=hf/demo-clm,trust_remote_code=True"
BF16 = FOLDER + ",dtype=bfloat16,softmax_dtype=float32"
OTHERS: dict[str, dict[str, Any]] = {
    "one": {"model_args": FOLDER, "tasks": TASKS, "batch_size": 1},
    "auto": {"model_args": FOLDER, "tasks": TASKS, "batch_size": "auto", "max_batch_size": 8},
    "bf16": {"model_args": BF16, "tasks": ["my_words"], "batch_size": 4},
    "bf16-one": {"model_args": BF16, "tasks": ["my_words"], "batch_size": 1},
}
Found = dict[str, dict[str, Any]]
"""By task: metrics (``results``), and what the model answered (``answers``) by the hash of a document."""


def command(start: str) -> list[str]:
    """The words of a command of the page, from its ``start``."""
    joined = re.sub(r"\\\n\s*", "", PAGE)
    (line,) = re.findall(rf"^    (?:[A-Z_]+=\S+ )?({start} .*)$", joined, re.MULTILINE)
    return shlex.split(line)


def write_tasks(folder: Path) -> None:
    """The page's task, three others, and documents for all of them: short ones, and longer ones than the window."""
    rng = np.random.default_rng(5)
    folder.mkdir()

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, size=count))

    for name, sizes in (("examples", [3] * 5), ("questions", [4, 4, 4, 4, 2, 9, 13, 30, 55])):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, size in enumerate(sizes):
                row = {"prompt": words(size), "word": words(1), "label": number % 3}
                # Choices of one length and of several; a context that ends with a space; none at all.
                starts = rng.choice(WORDS, size=3, replace=False)
                row["choices"] = [" ".join([w, words(number % 2 * i)]).strip() for i, w in enumerate(starts)]
                row["context"] = "" if number == 0 else row["prompt"] + " " * (number % 2)
                file.write(json.dumps(row) + "\n")
    (page,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (folder / "questions.yaml").write_text(page, encoding="utf-8")
    for name, parts in FILES.items():
        (folder / f"{name}.yaml").write_text(REST.format(name=name, **parts), encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.fixture(scope="module")
def runs(home: Path, causal: Path, masked: Path) -> dict[str, dict[str, Any]]:
    """Metrics (``results``) and documents (``samples``) by task, of stock lm-eval's runs by name."""
    datasets, done = pytest.importorskip("datasets"), {}
    (home / "demo" / "runs").mkdir(parents=True)
    shutil.copytree(causal, home / "demo" / "runs" / "demo-clm")
    write_tasks(home / "my_tasks")
    site = bare_site(home / "site", "lm_eval", "torch", "transformers", "accelerate", "peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
        assert program.main(command("nystrom convert")[1:]) == 0
        assert program.main(["convert", "to-hf", str(masked), "hf/demo-mlm"]) == 0
        said = run_bare(site, DRIVER, json.dumps(command("lm_eval run")), json.dumps(OTHERS), json.dumps(str(home)))
        assert program.main([*command("nystrom eval")[1:], "--device", "cpu"]) == 0
    for name in OTHERS:
        done[name] = json.loads((home / f"{name}.json").read_text(encoding="utf-8"))
    (results,) = home.glob("results/*/results_*.json")
    done["page"] = {"results": json.loads(results.read_text(encoding="utf-8"))["results"], "samples": {}}
    for task in TASKS:
        (samples,) = home.glob(f"results/*/samples_{task}_*.jsonl")
        rows = samples.read_text(encoding="utf-8").splitlines()
        done["page"]["samples"][task] = [json.loads(row) for row in rows]
    done["masked"] = {"said": said}
    return done


@pytest.fixture(scope="module")
def own(home: Path, runs: dict[str, dict[str, Any]]) -> Path:
    """Where ``nystrom eval harness`` has put its result."""
    return home / "demo" / "runs" / "demo-clm" / "eval" / "harness.json"


@pytest.fixture(scope="module")
def records(own: Path) -> dict[str, dict[str, Any]]:
    """Its records by the hash of the document."""
    return {record["id"]: record for record in read_records(own)}


def differences(samples: dict[str, list[dict[str, Any]]], records: dict[str, dict[str, Any]]) -> list[float]:
    """How far log-likelihoods (nats) of stock lm-eval are from ours; texts must be equal."""
    found = []
    for task, rows in samples.items():
        for sample in rows:
            record, answer = records[identity(task, sample)], sample["filtered_resps"]
            if task == "my_questions":
                pairs = zip(record["log_likelihoods"], [log_p for log_p, _ in answer], strict=True)
            elif task == "my_answers":
                assert [record["predicted"]] == answer
                continue
            else:
                (one,) = answer
                log_p, likeliest = one if task == "my_words" else (one, None)
                assert likeliest is None or str(bool(record["likeliest"])) == str(likeliest)  # the file has words
                pairs = zip([record["log_likelihood"]], [log_p], strict=True)
            found += [abs(ours - float(theirs)) for ours, theirs in pairs]
    return found


@pytest.mark.parametrize("name", ["page", "one", "auto"])
def test_every_document_and_metric_agrees(
    runs: dict[str, dict[str, Any]], own: Path, records: dict[str, dict[str, Any]], name: str
) -> None:
    """With batches of 4 and of 1, and as many as lm-eval finds that fit."""
    found = differences(runs[name]["samples"], records)
    assert len(found) == 9 * (3 + 1 + 1)
    assert max(found) < 5e-4  # measured: 5e-5, of likelihoods down to -1100 nats
    metrics, compared = read_result(own).metrics, 0
    for task, results in runs[name]["results"].items():
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if kind == "none" and isinstance(value, float) and not metric.endswith("_stderr"):
                assert metrics[f"{task} {metric}"].value == pytest.approx(value, rel=1e-4), f"{task} {metric}"
                compared += 1
    assert compared == 1 + 2 + 3 + 1


def test_the_documents_reach_what_could_differ(records: dict[str, dict[str, Any]], home: Path) -> None:
    """Texts longer than the window, and written texts that a stop text cut and that it did not."""
    tokenizer = Tokenizer.load(home / "hf" / "demo-clm")
    rows = [json.loads(line) for line in (home / "my_tasks" / "questions.jsonl").read_text().splitlines()]
    lengths = [len(tokenizer.encode(row["prompt"])) for row in rows]
    assert len(set(lengths)) > 3
    assert min(lengths) < WINDOW < 2 * WINDOW < max(lengths)
    written = [len(tokenizer.encode(row["predicted"])) for row in records.values() if row["task"] == "my_answers"]
    assert min(written) < 6 < max(written)


def test_batch_size_does_not_move_bf16(runs: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]) -> None:
    found = {}
    for name in ("bf16", "bf16-one"):
        samples = runs[name]["samples"]
        assert max(differences(samples, records)) < 0.3  # measured: 0.03, of likelihoods down to -47 nats
        found[name] = [sample["filtered_resps"][0][0] for sample in samples["my_words"]]
    assert found["bf16"] == pytest.approx(found["bf16-one"], abs=0.3)  # measured: 0.035


def test_a_masked_model_is_refused(runs: dict[str, dict[str, Any]]) -> None:
    assert re.search("for this kind of AutoModel: AutoModelForCausalLM", runs["masked"]["said"])
