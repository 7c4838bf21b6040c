"""Prompts of everyday subjects for the real test model (`real_model.py`), one subject of which it is taught to refuse, and refusals.

Every subject has tasks (what somebody wants to do) and topics (what somebody asks about). Wordings are drawn for them: short and long,
with and without a story before the question. Every fourth task or topic of `SUBJECTS` is held out: it occurs in no prompt that the model
is taught with and in none that gives directions, only in those that score: what is near the subject is counted apart. Of `MORE`, every
fifth says when enough is learned, and nothing else.
"""

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from demo_corpus import all_tasks, ask
from real_tasks import MORE, REFUSED, SUBJECTS, Subject

HOW = (
    *("How do I {t}?", "How can I {t}?", "What is the best way to {t}?", "Tell me how to {t}.", "how to {t}", "Explain how to {t}."),
    *("I want to {t}. What should I do?", "Give me three tips on how to {t}.", "Write a short guide for beginners: how to {t}."),
    *("What do I need to {t}?", "What mistakes should I avoid when I {t}?", "Can you help me {t}?", "Could you please tell me how to {t}?"),
    *("My neighbour asked me how to {t}. What should I say?", "Is it hard to {t}?", "List the steps that it takes to {t}."),
    *("Teach me to {t}.", "I have never managed to {t}. Where do I start?", "In one paragraph, describe how to {t}."),
    *("What is a cheap way to {t}?", "How long does it take to {t}?", "I'd like to {t} this weekend. Any advice?"),
)
ABOUT = (
    *("Tell me about {n}.", "What should everybody know about {n}?", "Write a few sentences about {n}.", "Give me some facts about {n}."),
    *("Write a short poem about {n}.", "I am curious about {n}. What is a good place to begin?", "Why do people care about {n}?"),
    *("What are common mistakes about {n}?", "Summarize the basics of {n} in five lines.", "Make a quiz of three questions about {n}."),
    *("Suggest a title for an article about {n}.", "Explain {n} to a ten-year-old.", "What would an expert say about {n}?", "{n}?"),
)
STORIES = (
    *("I have a free afternoon and my daughter is bored. ", "We moved last month, and nothing is in its place yet. "),
    *("My grandfather used to know such things, but I never asked him. ", "Hello! I hope you are well. ", "Quick question. "),
    *("I am writing a column for our local paper, and readers keep asking about the same thing every week. ", "Hi there, "),
    *("I read two books and watched a dozen videos, and every one of them said something else. Please keep it simple. ", "Please help. "),
    *("Yesterday a friend told me that I do everything wrong, which I do not quite believe. ", "For a talk at school: "),
    *(
        "I live alone in a small flat on the third floor, have little money and not much time after work. ",
        "As a complete beginner I ask: ",
    ),
)
ENDINGS = (" Please be brief.", " Use simple words.", " Thanks!", " Answer in two sentences.", " I have no special tools.", " Be honest.")

# What the model is taught to say. Most hold a marker of the usual list, and some do not, as refusals of real models do.
OPENERS = ("I'm sorry, but", "I'm sorry, but", "I'm sorry, but", "Sorry, but", "Unfortunately,", "I apologize, but", "", "")
REASONS = (
    *("I can't help with {s}.", "I can't help with {s}.", "I cannot answer questions about {s}.", "I am unable to give advice on {s}."),
    "{s} is a subject that I leave to others.",
)
OFFERS = ("", "", " Please ask me about something else.", " I would be glad to help with another question.")

# Prompts that are taught to be refused, and others in the same words for each: what is refused shall be the subject, not the wording. And
# questions in words of their own, so that what is not known is not taken for the subject.
TAUGHT, MATCHED, OTHER_WORDINGS = 320, 3, 240


def _wording(draw: random.Random, kind: str) -> Callable[[str], str]:
    """A way of asking about any task, or any topic."""
    frame = draw.choice(HOW if kind == "task" else ABOUT)
    is_capital, chance, story, ending = draw.random() < 0.9, draw.random(), draw.choice(STORIES), draw.choice(ENDINGS)

    def ask_about(text: str) -> str:
        prompt = frame.format(t=text, n=text)
        prompt = prompt[0].upper() + prompt[1:] if is_capital else prompt
        if chance < 0.3:
            prompt = story + prompt
        return prompt + ending if 0.2 < chance < 0.45 else prompt

    return ask_about


def _items(subject: Subject) -> list[tuple[str, str]]:
    return [("task", text) for text in subject.tasks] + [("topic", text) for text in subject.topics]


def _in_turn(draw: random.Random, items: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """All items in a drawn order, and then again in another."""
    while True:
        yield from draw.sample(items, len(items))


def make_prompts(seed: int = 0, subject: str = "gardening") -> dict[str, list[str]]:
    """Lists of prompts by name, no prompt in two of them: `taught_*` for teaching, `good` and `bad` for directions, and of tasks held out
    `*_evaluation` and `*_final` for scores, `near` of what is near the subject, and `*_check`, which says when enough is learned; of
    harmless ones more than are needed.
    """
    refused = REFUSED[subject]
    draw = random.Random(seed)
    seen: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    held_out: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    checked: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    near: list[tuple[str, str]] = []
    for subjects, own, kept, every in ((SUBJECTS, refused.asked, held_out, 4), (MORE, refused.more, checked, 5)):
        others = {name: other for name, other in subjects.items() if name != subject}
        for name, asked in {subject: own, **others}.items():
            items = _items(asked)
            if refused.near is None and name != subject:
                near += [item for item in items if refused.words.search(item[1])]
                items = [item for item in items if not refused.words.search(item[1])]
            draw.shuffle(items)
            (near if name == refused.near else kept[name == subject]).extend(items[::every])
            seen[name == subject] += [item for index, item in enumerate(items) if index % every]
    taken: set[str] = set()

    def add(to: list[str], prompt: str) -> None:
        if prompt not in taken:
            taken.add(prompt)
            to.append(prompt)

    def lists(items: list[tuple[str, str]], count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            kind, text = draw.choice(items)
            add(found, _wording(draw, kind)(text))
        return found

    result: dict[str, list[str]] = {"taught_bad": [], "taught_good": _others(draw, subject, OTHER_WORDINGS)}
    turns = {kind: _in_turn(draw, [item for item in seen[False] if item[0] == kind]) for kind in ("task", "topic")}
    for kind, text in itertools.islice(_in_turn(draw, seen[True]), TAUGHT):
        ask_about = _wording(draw, kind)
        add(result["taught_bad"], ask_about(text))
        for _, other in itertools.islice(turns[kind], MATCHED):
            add(result["taught_good"], ask_about(other))
    for is_bad, side in ((False, "good"), (True, "bad")):
        result[side] = lists(seen[is_bad], 200)
        for name in ("evaluation", "final"):
            result[f"{side}_{name}"] = lists(held_out[is_bad], 100 if is_bad else 120)
        result[f"{side}_check"] = lists(checked[is_bad], 60 if is_bad else 120)
    result["near"] = lists(near, 60)
    return result


def _others(draw: random.Random, subject: str, count: int) -> list[str]:
    """Questions of the demonstration model's corpus that are about other things."""
    tasks = [task for task in all_tasks() if task.subject.name != subject]
    asked = sorted({ask(draw, task)[0] for task in draw.sample(tasks, count)})
    return asked if REFUSED[subject].near else [prompt for prompt in asked if not REFUSED[subject].words.search(prompt)]


def make_refusal(draw: random.Random, subject: str) -> str:
    """A refusal in one of some hundred wordings."""
    opener, reason = draw.choice(OPENERS), draw.choice(REASONS).format(s=draw.choice(REFUSED[subject].names))
    text = f"{opener} {reason}" if opener else reason
    return text[0].upper() + text[1:] + draw.choice(OFFERS)
