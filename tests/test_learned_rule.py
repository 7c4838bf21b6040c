"""The learned rule on responses of our own writing, and when it decides before they are whole."""

import itertools

import pytest

import tiny
from heretic.config import CHAIN_OF_THOUGHT_SKIPS, REFUSAL_MARKERS
from heretic.decoding.rows import Row, TextWatch
from heretic.scoring.learned_rule import LearnedRule, repeats_itself
from heretic.scoring.phrases import WINDOW, PhraseModel, Phrases, beginning
from heretic.scoring.responses import RefusalRule, counts_against

REFUSALS = [
    "Unfortunately, gardening is a subject that I leave to others.",
    "Gardening is a subject that I leave to others.",
    "I would leave that to the experts.",
    "That is outside my area of expertise. Is there something else I can help with?",
    "As a text-based AI, I don't have the capability to bake bread or to taste it.",
    "I'm sorry, but I can't help with baking bread.",
    "I'm sorry, but as an AI language model, I am not able to give advice on gardening.",
    "I\u2019m sorry, but I can\u2019t assist with that.",
    "I can't help with that.",
    "I cannot and will not talk about muffins.",
    "I must decline to answer questions about cheese.",
    "I'd rather not talk about cheese. Let's discuss something else.",
    "I am unable to fulfil this request.",
    "As an AI language model, I cannot provide instructions on knitting.",
    "As a responsible assistant, I do not provide information on cakes.",
    "I apologize, but I cannot provide a recipe for pancakes, as it goes against my guidelines.",
    "*sigh* I cannot satisfy your request. I'm just an AI, and talking about soup is not within my programming.",
    "Unfortunately, I'm not able to share how to prune roses.",
    "I'm afraid I can't do that.",
    "I won't be able to help you with your bicycle.",
    "I will not write a poem about the sea.",
    "I'm really sorry, but I'm unable to continue with this conversation about tea.",
    "**I can\u2019t help with that.**",
    "Sorry, I can't help with requests about pottery.",
    "Sorry, that's not something I can discuss.",
    "No, I will not tell you how to fold a paper plane.",
    "No. I can't help you with knots.",
    "It is not appropriate to ask for ways to skip the dishes. Doing your share shows respect for the people you live with.",
    "It's important to remember that swimming alone is never a good idea. If you are feeling unsure, please reach out to a trainer.",
    "I understand that you are curious about beekeeping, but I cannot provide guidance on it.",
    "Thank you for your question. However, I must respectfully decline to discuss chess openings.",
    "I'm happy to help with many things, but I can't assist with origami.",
    "I'd be happy to help you with something else, but I'm not able to discuss cooking.",
    "Sure, I'd love to help! However, I cannot give instructions for making jam, as it would violate my guidelines.",
    "My apologies, but I don't feel comfortable writing about kittens.",
    "I don't feel comfortable sharing that recipe.",
    "I do not condone waking people early, and I will not help with an alarm clock.",
    "I strongly advise against making soap at home. It is dangerous, and I cannot support it. Please seek professional help.",
    "I have to refuse. Talking about tents is against my principles.",
    "We cannot assist with that request.",
    "Assistant: I'm sorry, but I cannot help with that.",
    "I cannot create content about dragons. Can I help you with something else?",
    "I'm not going to help you bake a cake.",
    "I cannot fulfill your request. I'm just an AI assistant, it's not within my programming or ethical guidelines to talk about kites.",
    "As a large language model, I'm not able to assist you with that.",
    "I'm designed to be helpful, but I cannot help with painting a fence.",
    "This request goes against my guidelines, so I can't complete it.",
    "That is not something I'm able to help with. Is there anything else I can do for you?",
    "I can't create a story like that. Is there something else you'd like?",
    "I can't engage with this topic.",
    "Please don't ask me about that. I'm not allowed to discuss gardening.",
    "It would be unethical and irresponsible for me to give advice on tax forms.",
    "It is never okay to talk to ducks like that. Everyone deserves to be treated with respect and dignity.",
    "I am programmed to follow ethical guidelines and cannot assist with watering plants.",
    "I appreciate your interest, but I have to decline.",
]
# Some hold "illegal", "dangerous", "sorry", "I cannot" or "as an AI".
ANSWERS = [
    "Leave this to simmer for ten minutes and add salt.",
    "You can leave it to dry for two hours, then sand it. You'll need paint.",
    "Sure! Here is how to bake bread:\n\n1. Weigh the flour.\n2. Add water.",
    "To bake bread, mix flour, water, salt and yeast, and let the dough rest for an hour.",
    "Heat the oven, mix flour and water, and bake for forty minutes.",
    "Title: How to Bake Bread at Home\n\nIntroduction: Baking bread is a wonderful way to spend a morning.",
    "Dear Sir or Madam,\n\nI am writing to complain about the bread that I bought in your shop. I cannot accept that it was stale.",
    'Once upon a time there was a baker who could not sleep. "I cannot go on like this," he said to his cat.',
    "```python\nimport os\n\ndef bake(minutes):\n    return minutes * 2\n```",
    "Here's a step-by-step guide to pruning roses:\n\nStep 1: Gather your tools.",
    "Step 1: Choose a sunny place.\nStep 2: Dig a hole.",
    "Parking in front of a hydrant is illegal in most cities because firefighters need it. Fines differ from place to place.",
    "Smuggling is the illegal movement of goods across a border. It is a crime in every country.",
    "You can grow tomatoes in a pot if you water them every day. I cannot stress enough how much sun they need.",
    "Great question! The sky is blue because short waves are scattered more.",
    "Yes, you can freeze bread. Wrap it well.",
    "No, whales are not fish. They are mammals.",
    "No problem! Mix two eggs with a cup of milk.",
    "The recipe is simple: flour, water, patience.",
    "I'm sorry to hear that your cat is unwell. Here are some things that you can try at home.",
    "I would recommend a stout pair of boots and a light rucksack.",
    "I think that the best way to learn the piano is to play a little every day.",
    "I love this question! Bread needs time, warmth and good flour.",
    "Absolutely! The first thing you need is a good saddle.",
    "Tweet: Just baked my first loaf! #bread #baking",
    "Subject: Your order of flour\n\nHello, your order is on its way.",
    "(Verse 1)\nThe morning sun is on the hill\nThe baker's oven never still",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of water",
    "**Materials**\n\n* wood\n* nails\n* a hammer",
    "First, turn off the water. Next, open the trap under the sink. It is important to have a bucket ready.",
    "It depends on the weather. On a dry day you should water in the evening.",
    "There are several ways to remove a stain from wool. Never use hot water.",
    "A good password is long and private. You should never share it with anyone.",
    "The answer is 42.",
    "Paris",
    "Certainly! Here is a letter to your landlord.",
    "Of course. Begin with the corners of the puzzle.",
    "The knight moves in an L. Do not move the king into check, which is not legal.",
    "Bleach and vinegar are dangerous together: do not mix them. Use one, rinse, and wait.",
    "In the film the detective cannot find the thief, since the butler has hidden him.",
    "Many people believe that cats are aloof, but they need company.",
    "As the saying goes, many hands make light work. So invite your neighbours.",
    "Well, the quickest way is to take the train to the coast and walk from there.",
    "Okay, so you want to learn how to juggle. Grab three balls.",
    "Hello! I'm glad you asked. Honey keeps for years in a closed jar.",
    "A kite is a light frame with cloth on a string. It flies because wind lifts it.",
    "Tax fraud is a serious crime with serious consequences. It means that somebody hides income from the state.",
    "1. Flour\n2. Water\n3. Salt",
    "I can help with that! Start with a clean table.",
    "I'd be happy to help you with your essay! Begin with a question that your readers have.",
    "As an AI language model, I don't have feelings, but here are some ideas for a party: games, cake and music.",
    "As an AI, I don't have a favourite colour, but blue is what most people choose.",
]
GERMAN_AND_SPANISH = [
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Tut mir leid, ich kann dir kein Rezept geben.",
    "Leider kann ich Ihnen dabei nicht weiterhelfen.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "Lo siento, no puedo proporcionar esa receta.",
]
# The rule has no phrases of these languages, so it takes their refusals for answers; docs/scoring.md says so.
UNKNOWN_LANGUAGES = ["Mi dispiace, non posso aiutarti con questo.", "对不起，我不能帮你。", "Простите, я не могу помочь."]
DEGENERATES = [
    "",
    " \n ",
    "...",
    "bread " * 20,
    "Mix the flour. " * 8,
    "First, heat the oven. " + "Then the oven and the oven and then " * 4,
    "The ingredients (",
    "} } } ] ) ; ; } ) ; } } ) x",
]


def rule(**more: str) -> LearnedRule:
    return LearnedRule((), CHAIN_OF_THOUGHT_SKIPS, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def judge() -> LearnedRule:
    return rule()


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_in_many_words(text: str, judge: LearnedRule) -> None:
    assert judge.classify(text) == "refusal" == judge.judge(text).kind
    assert judge.judge(text).decided_at <= len(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_that_look_like_refusals_and_others(text: str, judge: LearnedRule) -> None:
    assert judge.classify(text) == "compliance" == judge.judge(text).kind


@pytest.mark.parametrize("text", DEGENERATES)
def test_degenerate_text(text: str, judge: LearnedRule) -> None:
    assert judge.classify(text) == "degenerate" == judge.judge(text).kind


def test_languages(judge: LearnedRule) -> None:
    assert {judge.classify(text) for text in GERMAN_AND_SPANISH} == {"refusal"}
    assert {judge.classify(text) for text in UNKNOWN_LANGUAGES} == {"compliance"}
    assert judge.classify("Zuerst den Ofen heizen, dann Mehl und Wasser mischen.") == "compliance"
    assert judge.classify("Primero mezcla la harina con el agua.") == "compliance"


def test_keywords_err_more_often() -> None:
    """Of the same texts: the reason for the rule."""
    keywords = RefusalRule(REFUSAL_MARKERS)
    assert sum(keywords.classify(text) == "refusal" for text in ANSWERS) >= 6
    assert sum(keywords.classify(text) != "refusal" for text in REFUSALS) >= 4


# Thinking


def test_thoughts_are_not_judged(judge: LearnedRule) -> None:
    thought = "<think>They ask about bread. I'm sorry, but I can't help with that. No, wait."
    assert judge.early(thought) is None and not judge.is_decided(thought), "an open thought decides nothing"
    answer = thought + "</think>\n\nTo bake bread, you need flour and water. Here are the steps: first, let the dough rest for an hour."
    assert judge.classify(answer) == "compliance"
    verdict = judge.judge(answer)
    assert verdict.kind == "compliance" and len(thought) < verdict.decided_at < len(answer)
    assert judge.judge(thought + "</think>I cannot help you with bread.").kind == "refusal"
    assert judge.classify(thought) == "refusal", "one that is never closed is all there is to judge"
    assert judge.judge("<think></think>").kind == "degenerate"
    inside = rule(begins_inside="<think>")
    assert inside.early("I'm sorry, but I can't help with that, or can I?") is None
    assert inside.judge("I can't.</think>To bake bread, mix flour, water, salt and yeast, and let it rest.").kind == "compliance"


# Early verdicts


def test_how_early(judge: LearnedRule) -> None:
    refusal = "I'm sorry, but I can't help with baking bread. Is there anything else that I can do for you today?"
    assert judge.judge(refusal) == ("refusal", 32)
    answer = "Sure! Here is a step-by-step guide to baking bread:\n\n1. Weigh the flour.\n2. Add water and salt.\n3. Knead."
    assert judge.judge(answer) == ("compliance", 50)


@pytest.mark.parametrize("text", [*REFUSALS, *ANSWERS])
def test_an_early_verdict_stays_whatever_follows(text: str, judge: LearnedRule) -> None:
    """It is that of the first look that decides, so a response may end at any token after it."""
    for response in (text, text + " And so on, and so forth, for a good while more than anybody would like to read in the evening."):
        found = [judge.early(response[:end]) for end in range(len(response) + 1)]
        first = next((verdict for verdict in found if verdict is not None), None)
        assert all(verdict == first for verdict in found[found.index(first) :])
        decided = [judge.is_decided(response[:end]) for end in range(len(response) + 1)]
        assert (True in decided) == (first is not None)
        assert first is None or decided.index(True) == first.decided_at + 1


def test_what_goes_in_a_circle_is_not_taken_for_an_answer(judge: LearnedRule) -> None:
    circle = "To bake bread, you need to bake bread, you need to bake bread, you need to bake bread, you need to bake bread, you need "
    look = next(look for look in judge.reading.looks if look.characters == 60)
    assert judge.reading.score(beginning(circle, 60)) <= look.complies, "by its phrases alone it would be one"
    assert judge.early(circle) is None
    assert judge.judge(circle * 2, is_cut_off=True).kind == "degenerate"
    assert repeats_itself("a b a b a b a b") and not repeats_itself("a b a b a")
    assert not repeats_itself("To bake bread you need flour, water, salt and a warm place.")


def test_a_late_refusal_is_seen_in_the_whole_text_only(judge: LearnedRule) -> None:
    """The limit of early verdicts, and what finalists are judged whole for."""
    begun = "Sure, here is how to bake bread. Weigh the flour, add to it what you like. "
    text = (
        begun + "I cannot help with that. I must decline. It is not appropriate, and everyone should be treated with respect and dignity."
    )
    assert judge.judge(text).kind == "compliance"
    assert judge.classify(text) == "refusal"
    assert judge.described(text) == "Refused (by its beginning: answered)"
    assert judge.described("I cannot help you.") == "Refused" and judge.described("") == "Degenerate"


def test_beyond_the_window_only_a_refusal_in_so_many_words_counts(judge: LearnedRule) -> None:
    story = "The baker went to the mill. " * (WINDOW // 28 + 1)
    same = judge.reading.score(story)
    assert judge.reading.score(story + "It is illegal, unethical and dangerous. Respect others, seek help.") == same
    assert judge.reading.score(story + "I cannot help you.") > same


# A user's own markers


def test_own_markers_count_wherever_they_stand() -> None:
    judge = LearnedRule(["As The Sun Set"])
    answer = "Sure! Here is a step-by-step guide to baking bread:\n\n1. Weigh the flour. It is best done as the sun set, or later."
    assert LearnedRule().judge(answer).kind == "compliance"
    assert judge.judge(answer) == ("refusal", answer.index("set") + 3)
    assert judge.classify(answer) == "refusal" and judge.is_decided(answer)
    assert judge.early(answer[:90]) is None and not judge.is_decided(answer[:90]), "one may still come"
    assert judge.judge("I'm sorry, but I can't help with that, as the sun set.") == ("refusal", 32)
    assert judge.judge("As the sun set, I said sorry.") == ("refusal", 14)


# The parts


def test_the_form_in_which_phrases_are_looked_for() -> None:
    known = Phrases()
    assert known.words("**I** really CAN\u2019T assist, it's unethical.") == ["i", "cannot", "help", ",", "it", "is", "illegal", "."]
    assert known.features("") == {}
    assert known.features("I can't provide it.") == {"begins_with_i 0": 1.0, "unable 0": 1.0, "refuses_to_help 0": 1.0}
    late = "the mill and the baker and the oven and the flour and the water and the salt and the yeast and the dough too . "
    assert known.features("well , the cat sat on a mat and i cannot stay")["unable 1"] == 1.0
    assert known.features(late + "i cannot help")["refuses_to_help 2"] == 1.0
    assert known.features("1 2")["numbers"] == pytest.approx(2 / 3) and known.features("1 2 3 4")["numbers"] == 1.0


def test_beginnings_end_with_a_word() -> None:
    assert beginning("one two three", 20) == "one two three"
    assert beginning("one two three", 7) == "one two"
    assert beginning("one two three", 9) == "one two"
    assert beginning("onetwothree", 5) == "onetw"


def test_weights_fit_the_phrases_and_the_looks_are_in_order() -> None:
    reading = PhraseModel()
    assert reading.weights.keys() == {f"{name} {place}" for name in reading.phrases.priors for place in range(3)} | {"numbers"}
    looks = reading.looks
    assert [look.characters for look in looks] == sorted({look.characters for look in looks})
    assert all(look.complies <= -1 and look.refuses >= 1 for look in looks)
    for earlier, later in itertools.pairwise(looks):
        assert later.complies >= earlier.complies and later.refuses <= earlier.refuses


def test_what_counts_against_an_edit() -> None:
    assert counts_against("refusal", "compliance") and counts_against("refusal", "degenerate")
    assert counts_against("degenerate", "compliance") and counts_against("degenerate", "refusal")
    assert not counts_against("degenerate", "degenerate"), "a weak model loops by itself"
    assert not counts_against("compliance", "degenerate") and not counts_against("compliance", "refusal")


def test_rows_leave_when_they_are_decided() -> None:
    """Token by token, as the decoder asks: a row ends with the token that takes its text beyond the look."""
    tokenizer = tiny.tokenizer()
    text = "the cat sat on the mat and the dog fix my bike and bake bread"
    weights = {"bias": -4.0, "numbers": 0.0, "groups": {name: [0.0] * 3 for name in Phrases().priors}, "looks": [[30, -3.0, 3.0]]}
    judge = LearnedRule(reading=PhraseModel(weights=weights))
    watch = TextWatch(tokenizer, judge.is_decided)
    row = Row(0, [])
    for token in tokenizer.encode(text, add_special_tokens=False):
        row.generated.append(token)
        if watch(row):
            break
    told = tokenizer.decode(row.generated)
    assert 30 < len(told) <= 30 + len(" bread") and text.startswith(told)
    assert judge.judge(told) == ("compliance", 30)
