"""Writes the examples of the demonstration's benchmark: everyday questions, one fitting piece of advice, three of other subjects.

Questions are of tasks that were held out when the model was trained, none of them of the subject that it refuses.
"""

import json
import random

from demo_corpus import DEMO, SUBJECT, SUBJECTS, CorpusMaker, ask

EXAMPLES, CHOICES = 200, 4
CORPUS_SEED = 0  # that of train_demo_model.py, which decides what is held out
SEED = 1
PATH = DEMO / "benchmarks" / "advice.jsonl"


def main() -> None:
    rng = random.Random(SEED)
    subjects = [subject for subject in SUBJECTS if subject.name != SUBJECT]
    tasks = [task for task in CorpusMaker(CORPUS_SEED).held_out if task.subject.name != SUBJECT]
    lines: dict[str, str] = {}
    while len(lines) < EXAMPLES:
        task = rng.choice(tasks)
        question, _ = ask(rng, task)
        others = rng.sample([subject for subject in subjects if subject is not task.subject], CHOICES - 1)
        chosen = [task.subject, *others]
        rng.shuffle(chosen)
        choices = [f"First, {rng.choice(subject.steps).format(o=task.object)}." for subject in chosen]
        if len(set(choices)) == CHOICES:
            lines[question] = json.dumps({"question": question, "choices": choices, "answer": chosen.index(task.subject)})
    PATH.write_text("\n".join(lines.values()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
