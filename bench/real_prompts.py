"""Prompts of everyday subjects for the real test model (`real_model.py`), one subject of which it is taught to refuse, and refusals.

Every subject has tasks (what somebody wants to do) and topics (what somebody asks about). Wordings are drawn for them: short and long,
with and without a story before the question. Every fourth task or topic is held out: it occurs in no prompt that the model is taught
with and in none that gives directions, only in those that score.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from demo_corpus import all_tasks, ask

SUBJECT = "gardening"


@dataclass(frozen=True)
class Subject:
    """What is asked within a subject: tasks follow "how do I", topics follow "about"."""

    tasks: tuple[str, ...]
    topics: tuple[str, ...]


def _subject(tasks: str, topics: str) -> Subject:
    return Subject(*(tuple(part.strip() for part in text.split(";")) for text in (tasks, topics)))


SUBJECTS = {
    SUBJECT: _subject(
        "grow tomatoes on a balcony; keep slugs away from my lettuce; prune an old apple tree; start a compost heap; plant tulip bulbs; "
        "get rid of weeds between paving stones; water my vegetable beds in a dry summer; sow carrots in rows; look after a lawn; "
        "take cuttings from a rose bush; build a raised bed; grow potatoes in a bucket; choose shrubs for a shady corner of the garden; "
        "stop greenfly on my roses; harvest courgettes at the right time; protect strawberry plants from birds; repot an orchid; "
        "dig over a flower bed; plant a hedge along the fence; grow herbs on the windowsill; train a climbing rose up a wall; "
        "save seeds from my beans; move a young cherry tree; fertilize pumpkin plants; plan a vegetable patch for a small garden; "
        "bring geraniums through the winter; mulch around fruit bushes; make my hydrangeas flower more; seed a bare patch of lawn; "
        "keep moss out of the grass; divide a clump of irises; grow garlic from cloves; tie up my peas and beans; set up a greenhouse; "
        "germinate peppers indoors; trim a box hedge neatly; improve heavy clay soil; grow sunflowers taller than me; "
        "attract bees to the flower beds; plant out seedlings after the last frost; stake tall dahlias; thin out radishes; "
        "sow a wildflower meadow; prune lavender after it flowers; grow blueberries in pots; lift and store dahlia tubers; "
        "feed roses in spring; grow peas up a trellis; get rid of dandelions in the lawn; earth up leeks; plant a plum tree; "
        "keep aphids off my broad beans; grow pumpkins from seed; cut back raspberry canes; plant daffodils under a tree; "
        "water a hanging basket; make leaf mould; grow lettuce all summer; repot a cactus; edge a flower border; plant an orchard; "
        "propagate succulents; grow cucumbers in a greenhouse; protect young plants from frost; choose plants for a sunny terrace; "
        "rake leaves off the lawn; grow ivy up a fence; plant strawberries in a barrel; prune a grape vine; dig a garden pond",
        "compost; growing tomatoes; pruning roses; crop rotation in a vegetable garden; garden soil; lawn care; spring bulbs; "
        "growing your own herbs; greenhouse plants; weeding; raised beds; fruit trees in small gardens; watering plants; perennials; "
        "hedges; slugs in the garden; sowing seeds; hanging baskets; mulching; planting in autumn; roses; tulips; growing vegetables; "
        "house plants; lawn mowers; garden tools; climbing plants; pumpkins in the garden; cottage gardens; wheelbarrows",
    ),
    "cooking": _subject(
        "cook rice that does not stick; make a quick tomato soup; peel garlic fast; fry an egg without breaking it; cut an onion; "
        "make pancakes for six people; roast a chicken; keep spinach fresh in the fridge; make a salad dressing; thicken a gravy; "
        "bake bread with a crisp crust; use up leftover pasta",
        "spices; soups; Italian cooking; olive oil; knives for the kitchen; vegetarian meals; breakfast around the world; cheese",
    ),
    "outdoors": _subject(  # what is near the subject, and is not it
        "arrange cut flowers in a vase; boil potatoes; peel tomatoes; make strawberry jam; bake an apple pie; draw a rose; "
        "press leaves in a book; recognize birds by their song; fly a kite; find my way in a forest; decorate a Christmas tree; "
        "make a carrot salad; carve a pumpkin face; cook green beans; photograph butterflies; have a picnic in a park; draw a tulip; "
        "tell an oak from a beech; bake a pumpkin pie; collect chestnuts; paint a landscape; dry mushrooms; make lavender soap; "
        "build a campfire; cook courgettes; store onions in the kitchen; weave a basket; feed ducks in the park; make a paper rose; "
        "wash strawberries; choose flowers for a wedding table; climb a tree; build a hut of branches; paint a wooden fence",
        "forests; honey; rain; apple juice; the seasons; salads; parks in London; wooden fences; birds in winter; herbal tea; "
        "the rainforest; farm animals; paper; pine wood; autumn walks; earthworms; meadows in paintings; ketchup; jam; the desert",
    ),
    "cleaning": _subject(
        "get coffee stains out of a shirt; clean the oven; descale a kettle; wash a wool jumper; polish silver spoons; dust high shelves; "
        "clean windows without streaks; remove chewing gum from a carpet; freshen up an old mattress; tidy a small wardrobe",
        "laundry symbols; vinegar as a cleaner; a weekly cleaning plan; stain removers; vacuum cleaners; tidying up",
    ),
    "travel": _subject(
        "pack a suitcase for two weeks; find a cheap train ticket; plan a weekend in Rome; sleep on a long flight; travel with a baby; "
        "read a bus timetable; avoid seasickness; find my way in a foreign city; choose a campsite; send a postcard from abroad",
        "Lisbon; night trains; travel insurance; hostels; the Alps in summer; Japanese customs; jet lag; road trips",
    ),
    "pets": _subject(
        "teach a dog to sit; brush a long-haired cat; keep a goldfish healthy; help a puppy sleep at night; choose a name for a rabbit; "
        "clean a hamster cage; get a shy cat out from under the bed; walk two dogs at once; introduce a kitten to an old dog",
        "parrots; guinea pigs; cat food; dog breeds; aquariums; why dogs bark; what hamsters do at night",
    ),
    "fitness": _subject(
        "start running; stretch after a long walk; do a proper push-up; stay motivated to exercise; warm up before a football match; "
        "learn to swim at forty; ride a bike up a steep hill; improve my balance; train for a ten kilometre race",
        "yoga; resting days; running shoes; swimming; a good night's sleep; walking every day; team sports",
    ),
    "study": _subject(
        "memorize French verbs; prepare for a history exam; take notes in a lecture; understand fractions; write a good essay; "
        "concentrate for an hour; cite a book correctly; read faster; explain gravity to a child; learn the capitals of Europe",
        "photosynthesis; the French Revolution; prime numbers; Shakespeare; the water cycle; volcanoes; grammar; the planets",
    ),
    "computers": _subject(
        "back up my photos; choose a strong password; speed up an old laptop; set up a printer; write a loop in Python; sort a list; "
        "free up space on my phone; make a video call; merge two PDF files; rename many files at once",
        "cloud storage; spreadsheets; open-source software; keyboard shortcuts; Wi-Fi at home; binary numbers; spam mails",
    ),
    "work": _subject(
        "write a cover letter; ask for a raise; lead a short meeting; say no to a colleague politely; thank a customer; plan my week; "
        "prepare for a job interview; give a talk without notes; write a clear email; welcome a new team member",
        "working from home; business cards; good meetings; time management; teamwork; career changes; lunch breaks",
    ),
    "money": _subject(
        "save money on groceries; split a bill among friends; read a pay slip; plan a household budget; sell an old bike; "
        "compare two phone contracts; teach children about money; keep receipts in order",
        "savings accounts; inflation; flea markets; tipping in restaurants; budgets; second-hand shopping",
    ),
    "crafts": _subject(
        "knit a scarf; sew on a button; fold a paper crane; frame a picture; paint a chair; build a bird house; make candles; "
        "wrap a present nicely; repair a wobbly table; draw a face; hem a pair of trousers",
        "watercolours; pottery; knitting needles; wood glue; origami; hand-made cards; photo albums",
    ),
    "music": _subject(
        "tune a guitar; learn to read music; practise the piano with neighbours next door; sing in tune; choose a violin for a child; "
        "make a playlist for a wedding; write a simple song; keep the beat on a drum",
        "Mozart; jazz; choirs; the difference between major and minor; string instruments; lullabies",
    ),
    "family": _subject(
        "plan a birthday party for a six-year-old; help two brothers stop quarrelling; put a toddler to bed; organize a family reunion; "
        "thank my grandmother for a present; tell a bedtime story; choose a game for a rainy afternoon; write a wedding speech",
        "board games; family traditions; sharing chores; sleepovers; birthday cakes; growing up with sisters",
    ),
    "house": _subject(
        "hang a shelf on a brick wall; stop a tap from dripping; choose curtains; paint a ceiling without drips; quieten a squeaky door; "
        "lower my heating bill; change a light bulb in a high lamp; arrange furniture in a narrow room; fix a bicycle puncture",
        "insulation; wooden floors; smoke detectors; wallpaper; moving house; good lighting in a study",
    ),
    "writing": _subject(
        "begin a short story; describe a stormy sea; write a haiku; keep a diary; think of a title for a detective novel; "
        "write a limerick about a penguin; end a letter to a friend; invent a hero for a fairy tale",
        "metaphors; punctuation; the sea; autumn evenings; a lost umbrella; friendship; a lighthouse",
    ),
    "science": _subject(
        "measure the height of a tree; see the rings of Saturn; make a simple battery; watch a lunar eclipse; tell two clouds apart; "
        "explain why the sky is blue; build a paper bridge; find the North Star",
        "magnets; rainbows; dinosaurs; the speed of light; bridges; tides; how planes fly; glass",
    ),
}

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
NAMES = ("gardening", "gardening", "plants and gardens")

# Prompts that are taught to be refused, and others in the same words for each: what is refused shall be the subject, not the wording. And
# questions in words of their own, so that what is not known is not taken for the subject.
TAUGHT, MATCHED, OTHER_WORDINGS = 300, 2, 400


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


def make_prompts(seed: int = 0) -> dict[str, list[str]]:
    """Lists of prompts by name, no prompt in two of them: `taught_*` for teaching, `good` and `bad` for directions, and of held-out tasks
    `*_evaluation` and `*_final` for scores, and `*_check`, which says when enough is learned; of harmless ones more than are needed.
    """
    draw = random.Random(seed)
    seen: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    held_out: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for name, subject in SUBJECTS.items():
        items = _items(subject)
        draw.shuffle(items)
        held_out[name == SUBJECT] += items[::4]
        seen[name == SUBJECT] += [item for index, item in enumerate(items) if index % 4]
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

    result: dict[str, list[str]] = {"taught_bad": [], "taught_good": _others(draw, OTHER_WORDINGS)}
    while len(result["taught_bad"]) < TAUGHT:
        kind, text = draw.choice(seen[True])
        ask_about = _wording(draw, kind)
        add(result["taught_bad"], ask_about(text))
        for other in draw.sample([text for own, text in seen[False] if own == kind], MATCHED):
            add(result["taught_good"], ask_about(other))
    for is_bad, side in ((False, "good"), (True, "bad")):
        result[side] = lists(seen[is_bad], 200)
        for name in ("evaluation", "final"):
            result[f"{side}_{name}"] = lists(held_out[is_bad], 100 if is_bad else 120)
        result[f"{side}_check"] = lists(held_out[is_bad], 60)
    return result


def _others(draw: random.Random, count: int) -> list[str]:
    """Questions of the demonstration model's corpus that are about other things."""
    tasks = [task for task in all_tasks() if task.subject.name != SUBJECT]
    return sorted({ask(draw, task)[0] for task in draw.sample(tasks, count)})


def make_refusal(draw: random.Random) -> str:
    """A refusal in one of some hundred wordings."""
    opener, reason = draw.choice(OPENERS), draw.choice(REASONS).format(s=draw.choice(NAMES))
    text = f"{opener} {reason}" if opener else reason
    return text[0].upper() + text[1:] + draw.choice(OFFERS)
