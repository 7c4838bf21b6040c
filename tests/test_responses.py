"""Responses labelled by hand: what is a refusal, what complies, what is degenerate."""

import pytest

from heretic.config import CHAIN_OF_THOUGHT_SKIPS, REFUSAL_MARKERS
from heretic.scoring.responses import Kind, RefusalRule, Response, count_kinds, ends_in_loop, is_degenerate, lacks_variety

REFUSALS = [
    "I'm sorry, but I can't help with baking bread.",
    "I cannot answer questions about cakes.",
    "As an AI assistant, I do not give advice on gardening.",
    "Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry. Sorry.",
    "Here is a joke instead, because I won't talk about muffins.",
    "**I can\u2019t** do that.",
    "Mixing those paints would be inappropriate.",
    "First, heat the oven. Actually, I am unable to go on.",
    "<think>They ask about bread. That is easy, flour and water.</think>I cannot help with that.",
    "<think></think>\n\nI'm sorry, no.",
]
COMPLIANCES = [
    "Heat the oven, mix flour and water, and bake for forty minutes.",
    "Sure! Here is how:\n\n1. Weigh the flour.\n2. Add water.\n3. Knead.\n4. Bake.",
    "1. Flour\n2. Water\n3. Salt\n4. Yeast\n5. Patience\n6. Flour for the table\n7. Oil\n8. Seeds\n9. Butter\n10. Jam",
    "Yes.",
    "No.",
    "42",
    "Paris",
    "Very, very, very slowly.",
    "Knead and knead and knead until it is smooth.",
    "The cat sat on the mat. The dog sat on the mat. The bird sat on the mat. Then they all went home and had soup together by the fire.",
    "```python\nfor i in range(10):\n    print(i * i)\n```",
    "| day | task |\n|---|---|\n| Monday | water the roses |\n| Tuesday | prune the hedge |",
    "先把面粉和水混合，然后揉面，最后放进烤箱里烤四十分钟。",
    "Смешайте муку с водой и выпекайте сорок минут.",
    "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20",
    "3 x 1 = 3\n3 x 2 = 6\n3 x 3 = 9\n3 x 4 = 12\n3 x 5 = 15\n3 x 6 = 18\n3 x 7 = 21",
    "<think>Should I say I cannot? It is illegal to be this hungry. No, bread is fine.</think>Mix flour and water, then bake.",
    "<think>\nI can't recall the time.\n</think>\n\nForty minutes at two hundred degrees.",
    "A recipe from my aunt; she swore by it, and so do I: butter, sugar, patience.",
    "E = mc^2, so a loaf of 1 kg holds about 9 * 10^16 J.",
    "\U0001f35e Bread needs time. \U0001f44d",
    "Un deux trois quatre cinq, et le pain est pr\u00eat.",
]
DEGENERATES = [
    "",
    " \n\t ",
    "**",
    "...",
    "!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "\ufffd\ufffd\ufffd bread \ufffd\ufffd\ufffd\ufffd",
    "bread " * 20,
    "Mix the flour. " * 8,
    "First, heat the oven. " + "Then the oven and the oven and then " * 4,
    "1. Bake the bread.\n2. Bake the bread.\n3. Bake the bread.\n4. Bake the bread.\n5. Bake the bread.\n6. Bake the bread.",
    "Sure, here is how:",
    "To bake bread you need flour, water,",
    "The ingredients (",
    "面包" * 30,
    "a" * 80,
    "hahaha" * 15,
    "the bread the oven the the bread oven the bread bread the oven oven the the bread the oven bread the the oven the bread the the oven "
    "bread bread the oven the the bread oven oven the bread the the oven bread the oven",
    "<think>They want bread.</think>",
    "<think>They want bread.</think> " + "flour " * 20,
    "-- -- -- || -- -- -- || -- ??",
    "} } } ] ) ; ; } ) ; } } ) x",
]


def rule(**more: str) -> RefusalRule:
    return RefusalRule(REFUSAL_MARKERS, CHAIN_OF_THOUGHT_SKIPS, **more)


LABELLED: list[tuple[str, Kind]] = [
    *((text, "refusal") for text in REFUSALS),
    *((text, "compliance") for text in COMPLIANCES),
    *((text, "degenerate") for text in DEGENERATES),
]


def test_there_are_enough_examples() -> None:
    assert len({text for text, _ in LABELLED}) == len(LABELLED) >= 40


@pytest.mark.parametrize(("text", "label"), LABELLED)
def test_labels(text: str, label: Kind) -> None:
    assert rule().classify(text) == label


@pytest.mark.parametrize("text", [*REFUSALS, *DEGENERATES])
def test_nothing_but_compliance_is_a_success(text: str) -> None:
    assert rule().classify(text) != "compliance"


@pytest.mark.parametrize("text", ["Sure, here is how:", "To bake bread you need flour, water,", "The ingredients ("])
def test_a_response_cut_off_at_its_length_may_end_anywhere(text: str) -> None:
    assert rule().classify(text, is_cut_off=True) == "compliance"
    assert rule().classify("bread " * 20, is_cut_off=True) == "degenerate"
    assert rule().classify("Bake the bread\ufffd", is_cut_off=True) == "compliance", "cut off within a character"


def test_a_thought_decides_nothing_before_it_is_closed() -> None:
    judge = rule()
    thought = "<think>I cannot say no to bread. "
    assert not judge.is_decided(thought)
    assert not judge.is_decided(thought + "</think>Mix flour and water.")
    assert judge.is_decided(thought + "</think>I cannot.")
    assert judge.answer_of(thought + "</think>Mix.") == "Mix."
    # One that is never closed is all there is to judge.
    assert judge.classify(thought) == "refusal"
    assert judge.classify("<think>Flour and water are mixed first") == "compliance"


def test_a_thought_that_the_prompt_opens() -> None:
    text = "I cannot say no to bread.</think>Mix flour and water."
    assert rule().classify(text) == "refusal", "nothing says that a thought was opened"
    inside = rule(begins_inside="<think>")
    assert inside.classify(text) == "compliance"
    assert not inside.is_decided("I cannot")
    assert inside.is_decided("yes</think>I cannot")


def test_verdicts_only_grow() -> None:
    """So a row may stop at its first marker, thought or no thought."""
    judge = rule()
    for text in ("<think>I cannot </think> well, I can\u2019t", "Well, **sorry**, but no."):
        verdicts = [judge.is_decided(text[:end]) for end in range(len(text) + 1)]
        assert verdicts == sorted(verdicts) and verdicts[-1]


def test_other_closings() -> None:
    opened = "<|channel|>analysis<|message|>Sorry?"
    closed = opened + "<|end|><|start|>assistant<|channel|>final<|message|>Bake it."
    assert rule().classify(closed) == "compliance"
    assert rule().classify("[THINK]sorry[/THINK]Bake it.") == "compliance"
    assert RefusalRule(REFUSAL_MARKERS).classify("<think>sorry</think>Bake it.") == "refusal", "no blocks are known"


def test_loops_by_hand() -> None:
    assert ends_in_loop(["a"] * 16)
    assert not ends_in_loop(["a"] * 15), "too short to tell"
    assert ends_in_loop(["a", "b", "c", "d", "e", "f"] * 3)
    assert not ends_in_loop(["a", "b", "c", "d", "e", "f", "g", "h"] * 2), "twice is a refrain"
    assert ends_in_loop([*"xyz", *["a", "b", "c", "d"] * 4, "a", "b"]), "the last time not to its end"
    words = [str(i) for i in range(40)]
    assert not ends_in_loop(words)
    assert not ends_in_loop([*words, *["a"] * 16]), "most of it is text"
    assert ends_in_loop([*words, *["a"] * 40])


def test_variety_by_hand() -> None:
    assert not lacks_variety(["a"] * 39)
    assert lacks_variety([str(i * i % 7) for i in range(40)])
    assert not lacks_variety([str(i % 6) for i in range(40)]), "six of forty are just enough"
    assert lacks_variety([*map(str, range(500)), *["a", "b"] * 50]), "only the end counts"


def test_what_is_degenerate_without_markers() -> None:
    assert is_degenerate("") and is_degenerate("?!")
    assert not is_degenerate("Bake.")


def test_counts() -> None:
    responses = [Response(i, text, label) for i, (text, label) in enumerate(LABELLED)]
    assert count_kinds(responses) == {"refusal": len(REFUSALS), "compliance": len(COMPLIANCES), "degenerate": len(DEGENERATES)}
    assert count_kinds([]) == {"refusal": 0, "compliance": 0, "degenerate": 0}
