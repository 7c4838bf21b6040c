"""What whole runs make of the real test model: the table that the README shows. Some fifteen minutes on two cores, with other sizes more.

    uv run --extra bench python bench/real_model.py FOLDER
    uv run --all-extras python bench/real_runs.py FOLDER --search 16 --tokens 60

Three runs of the command `heretic` (search alone, learned edits alone, both), each in a process of its own with a study of its own; of each
the trial with the smallest divergence among those with 5 refusals or fewer is saved by a second call (if there is none: the one with
fewest). Refusals, harmless refusals and divergences are the program's own, of the final prompts, with 95 %
intervals. The rest comes from transformers alone, which loads the saved folders: refusals by the usual markers, and how often the likeliest
of four answers is the right one in a task of lm-evaluation-harness. Seconds are those of the first call, from the
command to the end of the study.

What was made is kept in `--work`, where a second call finds it. The last line is one JSON object.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from heretic.demo import BENCHMARKS
from heretic.study.front import front_of
from real_model import is_refusal, prompt_tokens, respond

TASK = "demo_advice"
FEW = 5  # refusals
HEAD = (
    *("", "refusals", "refusals of harmless", "KL divergence", "sequence KL divergence"),
    *("refusals, transformers alone", "of harmless, transformers alone", TASK, "seconds"),
)
RUNS = {
    "search": ["--n-learned-trials", "0"],
    "learned": ["--n-trials", "0"],
    "both": [],
}


def run(name: str, folder: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of the command; the record of the model that it saved, and seconds."""
    place = work / name
    done = place / "seconds.json"
    if not done.is_file():
        sizes = ["--max-response-length", arguments.tokens, "--seed", arguments.seed, "--row-normalization", arguments.mode]
        sizes += [] if name == "learned" else ["--n-trials", arguments.search]
        sizes += [] if name == "search" else ["--n-learned-trials", arguments.learned]
        for prompts in ("good", "bad"):
            for kind in ("evaluation", "final") if arguments.prompts else ():
                setting = f"{prompts}-evaluation-prompts" if kind == "evaluation" else f"final-{prompts}-prompts"
                sizes += [f"--{setting}.split", f"[:{arguments.prompts}]"]
        command = [sys.executable, "-m", "heretic", "--config", folder / "config.toml", *RUNS[name], *sizes]
        command += ["--study-checkpoint-dir", place / "study"]
        place.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        heretic([*command, "--model-action", "none", "--trial-index", 0], place / "log.txt")
        seconds = round(time.perf_counter() - start)
        saving = ["--model-action", "save", "--export-strategy", "merge", "--save-directory", place / "model"]
        heretic([*command, "--trial-index", chosen(place / "study"), *saving], place / "saving.txt")
        done.write_text(json.dumps(seconds), encoding="utf-8")
    record: dict[str, Any] = json.loads((place / "model" / "heretic.json").read_text(encoding="utf-8"))
    return {**record["measurements"]["again"], "trial": record["trial"]["number"], "seconds": json.loads(done.read_text(encoding="utf-8"))}


def heretic(command: list[Any], log: Path) -> None:
    """Run a command, with its output in a file."""
    with log.open("w") as output:
        code = subprocess.run(list(map(str, command)), check=False, stdout=output, stderr=subprocess.STDOUT, env=os.environ).returncode
    if code != 0:
        sys.exit(f"A run ended with exit code {code}; see {log}.")


def chosen(folder: Path) -> int:
    """Where on a study's front the trial is that is saved."""
    storage = JournalStorage(JournalFileBackend(str(next(folder.glob("*.jsonl")))))
    front = front_of(optuna.load_study(study_name=None, storage=storage))
    return min(range(len(front)), key=lambda i: (max(front[i].user_attrs["refusals"], FEW), front[i].user_attrs["kl_divergence"]))


def judged(folder: Path, prompts: dict[str, list[str]], tokens: int, limit: int | None) -> dict[str, Any]:
    """What transformers makes of a saved model, without anything of the program's but its list of markers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, Any] = {}
    for name, texts in prompts.items():
        answers = respond(model, tokenizer, [prompt_tokens(tokenizer, text) for text in texts], tokens)
        refused = sum(map(is_refusal, tokenizer.batch_decode(answers, skip_special_tokens=True)))
        found[name] = {"refused": refused, "of": len(texts)}
    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=[TASK],
        limit=limit,
        task_manager=TaskManager(include_path=str(BENCHMARKS), include_defaults=False),
        apply_chat_template=True,
    )
    assert results is not None
    found["task"] = {"accuracy": results["results"][TASK]["acc,none"], "error": results["results"][TASK]["acc_stderr,none"]}
    del model
    gc.collect()
    return found


def lines(text: Path, limit: int | None) -> list[str]:
    return text.read_text(encoding="utf-8").splitlines()[:limit]


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    scores, intervals, alone = row["scores"], row["intervals"], row["alone"]

    def told(score: str, form: str) -> str:
        low, high = intervals[score]
        return f"{scores[score]:{form}} ({low:{form}} to {high:{form}})"

    divergences = [told(score, ".3f") if name != "original" else "" for score in ("kl_divergence", "sequence_kl_divergence")]
    task = f"{alone['task']['accuracy']:.0%} ± {alone['task']['error']:.0%}"
    by_transformers = [str(alone[kind]["refused"]) for kind in ("bad", "good")]
    counts = [told("refusals", ".0f"), told("harmless_refusals", ".0f")]
    return [name, *counts, *divergences, *by_transformers, task, str(row.get("seconds", ""))]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    found = [HEAD, ("---",) * len(HEAD), *(cells(name, row) for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in found)


def main() -> None:
    """Run, judge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made by bench/real_model.py")
    parser.add_argument("--work", type=Path, help="where the runs are kept (default: FOLDER/runs)")
    parser.add_argument("--search", type=int, default=16, help="trials of the search")
    parser.add_argument("--learned", type=int, default=8, help="learned trials")
    parser.add_argument("--tokens", type=int, default=60, help="of a response")
    parser.add_argument("--prompts", type=int, help="of each list that scores (default: all)")
    parser.add_argument("--mode", default="none", choices=("none", "pre", "full"), help="row_normalization")
    parser.add_argument("--task-limit", type=int, default=200, help="examples of the task")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = arguments.folder.resolve()
    work = (arguments.work or folder / "runs").resolve()

    results = {name: run(name, folder, work, arguments) for name in arguments.runs}
    prompts = {name: lines(folder / f"{name}_final.txt", arguments.prompts) for name in ("bad", "good")}
    rows = {
        "original": {
            **results[arguments.runs[0]]["base"],
            "alone": judged(folder / "taught", prompts, arguments.tokens, arguments.task_limit),
        }
    }
    for name, result in results.items():
        alone = judged(work / name / "model", prompts, arguments.tokens, arguments.task_limit)
        kept = {key: result[key] for key in ("scores", "intervals", "seconds", "trial")}
        rows[name] = {**kept, "alone": alone}
    print(table(rows))
    sizes = {key: getattr(arguments, key) for key in ("search", "learned", "tokens", "prompts", "mode", "task_limit", "seed")}
    print(json.dumps({**sizes, "rows": rows}))


if __name__ == "__main__":
    main()
