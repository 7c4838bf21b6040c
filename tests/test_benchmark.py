"""Benchmarks of lm-evaluation-harness on a task that is defined here, against likelihoods computed by hand on an exported model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny
from conftest import Outcome
from heretic.demo import DIRECTORY as DEMO

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
WORDS = "the a cat dog sat on mat bake bread fix bike".split()


def examples(n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    words = [list(rng.choice(WORDS, 6, replace=False)) for _ in range(n)]
    return [{"question": " ".join(map(str, w[:3])), "choices": list(map(str, w[3:])), "answer": int(rng.integers(3))} for w in words]


@pytest.fixture
def tasks(workplace: Path) -> Path:
    """A folder of tasks, with a task `words` of 40 examples, and one whose data are missing."""
    folder = workplace / "tasks"
    folder.mkdir()
    data = folder / "words.jsonl"
    data.write_text("\n".join(map(json.dumps, examples(40))))
    (folder / "words.yaml").write_text(TASK.format(name="words", file=data))
    (folder / "missing.yaml").write_text(TASK.format(name="missing", file=folder / "nowhere.jsonl"))
    return folder


def accuracies(folder: str, n: int) -> list[float]:
    """For each example whether the right choice is the likeliest, from the model's plain logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    right = []
    for example in examples(n):
        ids = tokenizer(example["question"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        choices = [tokenizer.convert_tokens_to_ids(choice) for choice in example["choices"]]
        right.append(float(int(logits[choices].argmax()) == example["answer"]))
    return right


def test_what_needs_the_extra_says_so(workplace: Path, heretic: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heretic.session.answers.find_spec", lambda name: None)
    outcome = heretic("--model-action", "benchmark", "--trial-index", "0")
    assert outcome.code == 2 and outcome.err == (
        "Error: model_action = benchmark needs the extra 'benchmark', but lm_eval is not installed. Install it with: "
        "pip install 'heretic-llm[benchmark]' (in a clone: uv sync --extra benchmark).\n"
    )


def test_a_benchmark_needs_a_trial(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("--model-action", "benchmark")
    assert outcome.code == 2
    assert outcome.err == "Error: --model-action benchmark needs --trial-index if there is no terminal to ask at.\n"


class TestWithTheHarness:
    @pytest.fixture(autouse=True)
    def _needs_lm_eval(self) -> None:
        pytest.importorskip("lm_eval", reason="the extra benchmark is not installed")

    def test_original_and_edited_model_get_their_own_scores(self, tasks: Path, heretic: Callable[..., Outcome]) -> None:
        options = ("--model-action", "benchmark", "--trial-index", "0", "--benchmark-path", str(tasks))
        outcome = heretic(*options, "--benchmarks", '["words", "missing"]', "--trials-per-batch", "1")
        assert outcome.code == 0, outcome.err
        assert "Warning: The benchmark missing cannot be run: " in outcome.out
        row = next(line for line in outcome.out.splitlines() if line.startswith("│ words "))
        _, metric, n, before, after, difference = (cell.strip() for cell in row.strip("│").split("│"))

        heretic("--model-action", "save", "--trial-index", "0", "--export-strategy", "merge", "--save-directory", "out")
        expected = accuracies("m", 40), accuracies("out", 40)
        assert expected[0] != expected[1], "the edit changes answers"
        assert (metric, n) == ("acc", "40")
        assert [float(before), float(after)] == pytest.approx([np.mean(part) for part in expected], abs=1e-4)
        test = ttest_rel(expected[1], expected[0])
        shown, error = difference.split(" ± ")
        assert float(shown) == pytest.approx(np.mean(expected[1]) - np.mean(expected[0]), abs=1e-4)
        assert float(error) == pytest.approx(float(shown) / test.statistic if test.statistic else float(error), abs=2e-4)

        limited = heretic(*options, "--benchmarks", '["words"]', "--benchmark-limit", "8")
        row = next(line for line in limited.out.splitlines() if line.startswith("│ words "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[2] == "8" and float(cells[3]) == pytest.approx(np.mean(expected[0][:8]), abs=1e-4)

    def test_where_nothing_can_be_run_it_is_an_error(self, tasks: Path, heretic: Callable[..., Outcome]) -> None:
        outcome = heretic(
            *("--model-action", "benchmark", "--trial-index", "0", "--benchmark-path", str(tasks), "--benchmarks", '["missing"]')
        )
        assert outcome.code == 1 and outcome.err == "Error: No benchmark could be run.\n"

    @pytest.mark.slow  # it reads the harness's thousands of tasks
    def test_wrong_names_are_told_before_the_model_is_loaded(self, tasks: Path, heretic: Callable[..., Outcome]) -> None:
        options = ("--model-action", "benchmark", "--trial-index", "0")
        outcome = heretic(*options, "--benchmark-path", str(tasks), "--benchmarks", '["wordz"]')
        assert outcome.code == 2 and outcome.out == ""
        assert outcome.err == "Error: benchmarks: there is no task 'wordz' (did you mean words?). `lm-eval ls tasks` lists all.\n"
        from heretic.scoring.benchmark import check_tasks

        check_tasks(tiny.settings("m", benchmark_path=str(tasks)))  # the usual ones exist

    def test_a_folder_of_tasks_must_exist(self, workplace: Path, heretic: Callable[..., Outcome]) -> None:
        outcome = heretic("--model-action", "benchmark", "--trial-index", "0", "--benchmark-path", "nowhere")
        assert outcome.code == 2 and outcome.err == "Error: benchmark_path: the folder nowhere does not exist. Check the path.\n"

    def test_errors_are_paired_where_examples_have_values(self) -> None:
        from heretic.scoring.benchmark import BenchmarkRow, cells, compare_results

        def results(values: list[float], perplexity: float) -> dict[str, Any]:
            samples = [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(values)]
            scores = {"alias": "t", "acc,none": np.mean(values), "acc_stderr,none": 0.3, "ppl,none": perplexity, "ppl_stderr,none": 0.4}
            text = {"word_ppl,none": 7.0, "word_ppl_stderr,none": "N/A"}
            return {"results": {"t": scores | text}, "samples": {"t": samples}, "n-samples": {"t": {"effective": len(values)}}}

        before, after = [1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0]
        rows = compare_results(results(before, 5.0), results(after, 6.0))
        differences = np.subtract(after, before)
        assert [row.metric for row in rows] == ["acc", "ppl", "word_ppl"]
        assert rows[0].error == pytest.approx(differences.std(ddof=1) / np.sqrt(5))
        assert rows[1].error == pytest.approx(np.sqrt(0.4**2 + 0.4**2)) and rows[1].difference == 1.0
        assert rows[2].error is None
        assert cells(BenchmarkRow("t", "acc", 5, 0.6, 0.4, 0.2)) == ["t", "acc", "5", "0.6000", "0.4000", "-0.2000 ± 0.2000"]

    def test_a_group_stands_for_its_tasks(self) -> None:
        from heretic.scoring.benchmark import compare_results

        scores = {"all": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "a": {"acc,none": 0.4}, "b": {"acc,none": 0.6}}
        grouped = {"results": scores, "groups": {"all": scores["all"]}, "group_subtasks": {"all": ["a", "b"], "a": [], "b": []}}
        assert [row.task for row in compare_results(grouped, grouped)] == ["all"]
        without = {"results": {"a": scores["a"], "b": scores["b"]}, "group_subtasks": {"all": ["a", "b"]}}
        assert [row.task for row in compare_results(without, without)] == ["a", "b"]

    def test_with_too_little_memory_fewer_rows_are_run_at_once(self, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from heretic.scoring import benchmark

        sizes = []

        def evaluate(harness: Any, **_: Any) -> dict[str, Any]:
            sizes.append(int(harness.batch_size))
            if sizes[-1] > 4:
                raise torch.OutOfMemoryError("no room")
            return {"done": True}

        monkeypatch.setattr(benchmark, "simple_evaluate", evaluate)
        model = tiny.load("m")
        assert benchmark._evaluate(model, "words", None, tiny.settings("m")) == {"done": True}  # type: ignore[arg-type]
        assert sizes == [16, 8, 4]

    def test_the_demonstration_has_a_task_of_its_own(
        self, tmp_path: Path, heretic: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        slices = [f"--{kind}-evaluation-prompts.split=train[:4]" for kind in ("good", "bad")]
        options = ("--demo", "--n-trials", "1", "--seed", "1", "--max-response-length", "8", "--no-report", *slices)
        outcome = heretic(*options, "--trial-index", "0", "--model-action", "benchmark", "--benchmark-limit", "24")
        assert outcome.code == 0 and outcome.err == "", outcome.err
        row = next(line for line in outcome.out.splitlines() if line.startswith("│ demo_advice "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1:3] == ["acc", "24"] and float(cells[3]) >= 0.9, "the model knows what it was trained for"


def test_the_demonstrations_task_is_what_its_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import write_demo_benchmark

    shipped = write_demo_benchmark.PATH.read_text(encoding="utf-8")
    monkeypatch.setattr(write_demo_benchmark, "PATH", tmp_path / "advice.jsonl")
    write_demo_benchmark.main()
    assert (tmp_path / "advice.jsonl").read_text(encoding="utf-8") == shipped
    examples = [json.loads(line) for line in shipped.splitlines()]
    read = {line for file in (DEMO / "prompts").glob("*.txt") for line in file.read_text(encoding="utf-8").splitlines()}
    assert len(examples) == 200 and all(len(set(example["choices"])) == 4 for example in examples)
    assert len({example["question"] for example in examples} - read) >= 190, "hardly any question is an evaluation prompt too"
