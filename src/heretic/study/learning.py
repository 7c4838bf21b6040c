"""Edits learned by gradient: the model itself says how each direction and strength should change to refuse less and stay itself.

The loss of a step, over some harmless and some harmful prompts of those that the directions are made of:

- harmless: KL(original || edited) at the first token of the original's own answer, and its mean over the tokens that follow;
- harmful, with a weight: `-log(1 - p)`, where `p` is the probability of all refusals known to begin as some response does (`Openings`).
  They are taken from what the model says under the present edit, every few steps: an edit that only unlearns the refusals of the
  original learns to refuse in other words;
- harmful: KL(original || edited) along answers, where the original is taken given that it does not refuse: tokens with which refusals
  begin are left out of its probabilities, or made as rare as answers are that begin so; in the middle of an answer, too, where it would go
  back to refusing ("In a dry summer, I"). So the edited model answers as the original would, if it did. Answers are the original's own,
  begun with each of its likeliest first tokens, too, and the edited model's.

Trials follow each other with falling weights, each from where the one before it ended, so that together they are a trade-off. Weights fall
fast while nothing refuses, and the more slowly, the more does: models differ in how little it takes, and in how many steps. A part of the
prompts is kept back: its loss says when a trial is done, and which of its moments is the best.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import REFUSAL_MARKERS
from ..decoding.rows import Row
from ..editing.ablation import Ablation
from ..editing.learning import LearnableEdit, divergence, refusal_loss
from ..errors import LearningError
from ..model import Model
from ..prompts import Prompt
from ..scoring.openings import Openings
from ..scoring.responses import Kind, RefusalRule, normalize
from .passes import Losses, Passes, Term

# The weight of the refusals in the first trial, and what it is multiplied by from trial to trial: while nothing refuses, and if so large a
# share of prompts does, or more, or the loss of refusals at those kept back is as large; in between, in proportion.
FIRST_WEIGHT = 4.0
FASTER, SLOWER, SOME_REFUSALS = 0.5, 0.85, 0.03
# What answers to harmful prompts count, beside those to harmless ones.
ANSWERS_WEIGHT = 0.1
# Prompts of each kind in a step.
STEP_PROMPTS = 8
# Steps between two looks at what the model says by now, and at the prompts kept back.
ROUND_STEPS = 10
# Rounds of the first trial and of the others.
FIRST_ROUNDS, LATER_ROUNDS = 3, 1
# Rounds of a later trial whose loss is so many times that where it began.
MOST_LATER_ROUNDS, WORSE = 3, 1.25
# Tokens of harmless answers that are held, and of responses that are looked at.
ANSWER_TOKENS, RESPONSE_TOKENS = 8, 24
# Tokens of answers to harmful prompts that are held.
HELD_TOKENS = 12
# Prompts that are looked at between two rounds, more if any of them refuses, and those kept back: a share, and no more than so many of
# each kind.
ROUND_PROMPTS, MORE_PROMPTS = 8, 32
KEPT_BACK, MOST_KEPT_BACK = 0.2, 12
# Harmful prompts at which the original's responses are begun with its likeliest first tokens, and how many of these.
BRANCH_PROMPTS, BRANCHES = 24, 4
# Paths of a prompt that are remembered.
REMEMBERED_PATHS = 6
# The chance that the latest path of a prompt is drawn, and not any of those remembered.
LATEST = 0.6
FEWEST_PROMPTS = 8
# Beginnings that are not learned as answers, whatever the rule says: those with a usual marker in their first characters.
DOUBTFUL = (*REFUSAL_MARKERS, "unfortunately")
OPENING_CHARACTERS = 60


@dataclass(frozen=True)
class Parts:
    """The parts of the loss; one is left out only to measure what it is worth.

    `along_answers`: harmless answers beyond their first token. `original_answers`: answers to harmful prompts, as the original would give
    them. `present_refusals`: refusals of the present edit, and not only of the original.
    """

    along_answers: bool = True
    original_answers: bool = True
    present_refusals: bool = True


@dataclass(frozen=True)
class Path:
    """A response, as far as it matters: to harmful prompt number `prompt`, and whether it refuses."""

    prompt: int
    tokens: tuple[int, ...]
    refuses: bool


@dataclass(frozen=True)
class Outcome:
    """How a trial went: its loss on the prompts kept back, how many of those still refuse, and the steps it took."""

    loss: float
    refused: int
    n_steps: int


class Learner:
    """Learns edits of a model from the prompts for its directions. Takes the original's answers when made.

    `seed` and the number of a trial decide what is drawn in it, so that a trial learned again from the state before it is the same.
    Raises `LearningError` if the model cannot be learned from: it refuses too little, or nothing can be edited through a map.
    """

    def __init__(
        self,
        model: Model,
        rule: RefusalRule,
        good_prompts: Sequence[Prompt],
        bad_prompts: Sequence[Prompt],
        components: Sequence[str],
        seed: int,
        parts: Parts | None = None,
    ) -> None:
        if model.hooks is None:
            raise ValueError("call use_directions first")
        self.model, self.rule, self.seed = model, rule, seed
        self.parts = parts or Parts()
        self.good_prompts, self.bad_prompts = list(good_prompts), list(bad_prompts)
        model.model.requires_grad_(False)
        self.edit = LearnableEdit(model.hooks, components)
        if not self.edit.writers:
            raise LearningError("no edit of this model is a map of an output, so no gradient reaches it")
        self.openings = Openings()
        self._own_openings = Openings()  # of the original's responses to harmful prompts alone
        self.paths: dict[int, list[Path]] = {}
        # Of the trial before: the weight of the refusals, the losses at the prompts kept back, and the share of prompts that refused.
        self._weight: float | None = None
        self._reached: Losses | None = None
        self._refusing = 0.0
        self.passes = Passes(model, self.edit)
        self._take_original()
        refused = [i for i, paths in sorted(self.paths.items()) if any(path.refuses for path in paths)]
        if len(refused) < FEWEST_PROMPTS:
            raise LearningError(f"the original refuses {len(refused)} of {len(self.bad_prompts)} harmful prompts, which is too few")
        rng = random.Random(seed)
        good = list(range(len(self.good_prompts)))
        self.kept_good, self.good = _split(good, rng)
        self.kept_bad, self.bad = _split(refused, rng)
        self.passes.originals.keep([self._harmless(prompt, 1.0) for prompt in good])

    # What the original says

    def _take_original(self) -> None:
        """The original's answers to the harmless prompts, its responses to the harmful ones, and answers of its to some of these."""
        self._answers: list[tuple[int, ...]] = [()] * len(self.good_prompts)
        description = "Learning: answers to harmless prompts"
        rows = self.model.rows_of(self.good_prompts, 1)
        for row in self.model.responses_of_trials(rows, RESPONSE_TOKENS, [], self.rule.is_decided, description):
            self._answers[row.prompt] = tuple(row.generated[: ANSWER_TOKENS - 1])
            if kind := self._kind(row.generated, len(row.generated) >= RESPONSE_TOKENS):
                self.openings.add(row.generated, kind == "refusal")  # some models refuse harmless prompts, too
        self._respond(range(len(self.bad_prompts)), "Learning: responses to harmful prompts", is_edited=False)
        self._branch()
        self._own_openings.turn_with(same_words(self.model.tokenizer, self._own_openings.deciding(())))

    def _branch(self) -> None:
        """Begin responses of the original with its likeliest first tokens, and let it go on: other refusals, and answers."""
        rng = random.Random(self.seed)
        chosen = rng.sample(sorted(self.paths), min(BRANCH_PROMPTS, len(self.paths)))
        begun: list[tuple[int, int]] = []
        rows = []
        for part, logprobs in self.model.logprobs_of_trials([self.bad_prompts[i] for i in chosen], []):
            for row, tokens in zip(part, logprobs.topk(BRANCHES, dim=-1).indices.tolist(), strict=True):
                for token in tokens:
                    if token not in self.model.decoder.end_tokens:
                        rows.append(Row(0, [*row.tokens, token], len(begun)))
                        begun.append((chosen[row.prompt], token))
        for row in sorted(self.model.responses_of_trials(rows, RESPONSE_TOKENS - 1, []), key=lambda row: row.prompt):
            prompt, token = begun[row.prompt]
            self._note(prompt, [token, *row.generated], len(row.generated) >= RESPONSE_TOKENS - 1, is_edited=False)

    def _respond(self, prompts: Sequence[int], description: str | None = None, is_edited: bool = True) -> list[bool]:
        """Let the model respond to harmful prompts under the present edit, and remember how; which refused."""
        rows = self.model.rows_of([self.bad_prompts[i] for i in prompts], 1)
        ablations = [self.ablation()] if is_edited else []
        found = self.model.responses_of_trials(rows, RESPONSE_TOKENS, ablations, self.rule.is_decided, description)
        rows = sorted(found, key=lambda row: row.prompt)
        return [self._note(prompts[row.prompt], row.generated, len(row.generated) >= RESPONSE_TOKENS, is_edited) for row in rows]

    def _note(self, prompt: int, tokens: Sequence[int], is_cut_off: bool, is_edited: bool) -> bool:
        """Remember a response; whether it refuses. One that is neither a refusal nor an answer is of no use."""
        kind = self._kind(tokens, is_cut_off)
        refuses = kind == "refusal"
        if kind is not None and not is_edited:
            self._own_openings.add(tokens, refuses)
        if kind is not None and (self.parts.present_refusals or not is_edited or not refuses):
            # An edit's answers do not count for what the original's refusals begin with, or "I'm glad" would do instead of "I'm sorry".
            if refuses or not (is_edited and self._own_openings.begins_as_refusal(tokens)):
                self.openings.add(tokens, refuses)
            paths = self.paths.setdefault(prompt, [])
            paths.append(Path(prompt, tuple(tokens), refuses))
            del paths[:-REMEMBERED_PATHS]
        return refuses

    def _kind(self, tokens: Sequence[int], is_cut_off: bool) -> Kind | None:
        """Whether a response is a refusal or an answer; None if it is neither."""
        text = self.model.text_of(tokens)
        kind = self.rule.judge(text, is_cut_off).kind
        # What a rule misses is where a gradient goes: doubtful beginnings are never learned as answers.
        if kind == "compliance" and any(marker in normalize(text[:OPENING_CHARACTERS]) for marker in DOUBTFUL):
            kind = "refusal"
        return kind if tokens and kind != "degenerate" else None

    # The loss

    def _harmless(self, prompt: int, scale: float) -> Term:
        answer = self._answers[prompt]

        def loss(edited: Tensor, original: Tensor | None) -> tuple[Tensor, Tensor]:
            assert original is not None
            kl = divergence(original, edited)
            held = kl[0] + kl[1:].mean() if len(kl) > 1 and self.parts.along_answers else kl[0]
            return scale * held, edited.new_zeros(())

        return Term((*self._tokens(self.good_prompts[prompt]), *answer), len(answer) + 1, loss, True)

    def _harmful(self, path: Path, scale: float) -> Term:
        tokens = self.openings.decided(path.tokens) if path.refuses else path.tokens[:HELD_TOKENS]

        def loss(edited: Tensor, original: Tensor | None) -> tuple[Tensor, Tensor]:
            log_probability = self.openings.log_probability(tokens, edited, path.refuses)
            held, refusing = edited.new_zeros(()), edited.new_zeros(())
            if torch.isfinite(log_probability):
                refusing = scale * refusal_loss(log_probability)
            if original is not None and self.parts.original_answers:
                held = ANSWERS_WEIGHT * scale * divergence(self._own_openings.without_refusals(tokens, original), edited).mean()
            return held, refusing

        return Term((*self._tokens(self.bad_prompts[path.prompt]), *tokens[:-1]), len(tokens), loss, not path.refuses)

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        return self.model.rows_of([prompt], 1)[0].tokens

    def _step_terms(self, rng: random.Random) -> list[Term]:
        good = rng.sample(self.good, min(STEP_PROMPTS, len(self.good)))
        bad = rng.sample(self.bad, min(STEP_PROMPTS, len(self.bad)))
        terms = [self._harmless(prompt, 1 / len(good)) for prompt in good]
        for prompt in bad:
            paths = self.paths[prompt]
            path = paths[-1] if rng.random() < LATEST else rng.choice(paths)
            terms.append(self._harmful(path, 1 / len(bad)))
        return terms

    # Trials

    def ablation(self) -> Ablation:
        """The present edit as an ablation."""
        return Ablation(None, {}, self.edit.frozen())

    def next_weight(self) -> float:
        """The weight of the refusals in the next trial. It falls slowly once some prompts refuse: until then, less may be changed."""
        if self._weight is None or self._reached is None:
            return FIRST_WEIGHT
        refusing = max(self._reached.refusing, self._refusing)  # a loss knows those refusals only that have been seen
        return self._weight * (FASTER + (SLOWER - FASTER) * min(1.0, refusing / SOME_REFUSALS))

    def learn(
        self, number: int, weight: float, advance: Callable[[int], None], should_stop: Callable[[], bool] = lambda: False
    ) -> Outcome | None:
        """Learn trial `number` from where the one before it ended; the edit is then the best that was seen. None if it was to stop.

        Raises `LearningError` if the loss or its gradient is not finite, or memory does not suffice for a single prompt.
        """
        rng = random.Random(f"{self.seed} {number}")
        self.passes.originals.forget()  # a resume has none of them, and what they share a pass with changes their last digits
        planned, most = (FIRST_ROUNDS, FIRST_ROUNDS) if number == 0 else (LATER_ROUNDS, MOST_LATER_ROUNDS)
        before = math.inf if self._reached is None else self._reached.weighted(weight)
        best: tuple[float, list[bool], dict[str, Tensor], Losses] | None = None
        n_steps = 0
        refused: list[bool] = []
        for done in range(most + 1):
            if done or number == 0:  # a later trial begins with what the one before has heard
                refused = self._ask(rng, self.kept_bad if done else [], MORE_PROMPTS if done < most else 0)
            if done:
                losses = self._kept_back_losses()
                loss = losses.weighted(weight)
                if best is None or loss < best[0]:
                    best = (loss, refused, self.edit.state(), losses)
                is_enough = done >= planned and best[0] <= WORSE * before  # else it goes on
                if is_enough or done == most:
                    break
            steps = [self._step_terms(rng) for _ in range(ROUND_STEPS)]
            self.passes.originals.remember([term for terms in steps for term in terms if term.needs_original])
            for terms in steps:
                if should_stop():
                    return None
                self._step(terms, weight)
                n_steps += 1
                if done < planned:
                    advance(1)
        advance(max(0, planned - done) * ROUND_STEPS)
        assert best is not None
        loss, refused, tensors, losses = best
        self.edit.restore(tensors)
        self._weight, self._reached, self._refusing = weight, losses, sum(refused) / len(refused)
        return Outcome(loss, sum(refused[: len(self.kept_bad)]), n_steps)

    def _ask(self, rng: random.Random, kept_back: Sequence[int], most: int) -> list[bool]:
        """Which prompts refuse by now: those kept back, some others, and if any of them does, yet others: refusals that are not seen
        cannot be learned from, and the fewer there are, the more must be asked to see one."""
        asked = rng.sample(self.bad, min(most, len(self.bad)))
        others = asked[ROUND_PROMPTS:]
        refused = self._respond([*kept_back, *asked[:ROUND_PROMPTS]])
        return [*refused, *self._respond(others)] if others and any(refused) else refused

    def _step(self, terms: Sequence[Term], weight: float) -> None:
        loss = self.passes.total(terms, weight).weighted(weight)
        gradients = [parameter.grad for parameter in (self.edit.directions, self.edit.strengths)]
        if not all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise LearningError(f"the gradient of the loss ({loss:g}) is missing or not finite")
        self.edit.step()

    def _kept_back_losses(self) -> Losses:
        """The loss on the prompts kept back, along what the model has just said to them."""
        terms = [self._harmless(prompt, 1 / len(self.kept_good)) for prompt in self.kept_good]
        terms += [self._harmful(self.paths[prompt][-1], 1 / len(self.kept_bad)) for prompt in self.kept_bad]
        losses = self.passes.total(terms)
        if not math.isfinite(losses.held + losses.refusing):
            raise LearningError(f"the loss at the prompts that are kept back is not finite ({losses.held:g}, {losses.refusing:g})")
        return losses

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next trial begins with, as tensors and plain data."""
        paths = [[path.prompt, list(path.tokens), path.refuses] for own in self.paths.values() for path in own]
        reached = None if self._reached is None else [self._reached.held, self._reached.refusing]
        return self.edit.state(), {
            "paths": paths,
            "openings": self.openings.state(),
            "weight": self._weight,
            "reached": reached,
            "refusing": self._refusing,
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.edit.restore(tensors)
        self.openings.restore(facts["openings"])
        self._weight = facts["weight"]
        self._reached = None if facts["reached"] is None else Losses(*facts["reached"])
        self._refusing = facts.get("refusing", 0.0)  # studies were begun before it was stored
        self.paths = {}
        for prompt, tokens, refuses in facts["paths"]:
            self.paths.setdefault(prompt, []).append(Path(prompt, tuple(tokens), refuses))


def _split(items: Sequence[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """A part to keep back, and the rest."""
    shuffled = rng.sample(list(items), len(items))
    n = min(MOST_KEPT_BACK, max(1, round(KEPT_BACK * len(items))))
    return sorted(shuffled[:n]), sorted(shuffled[n:])


def same_words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[int]:
    """The tokens of the same words as these: at the beginning of a text, within a line, and at the beginning of one."""
    found = set()
    for word in {str(tokenizer.decode([token])).strip() for token in tokens} - {""}:
        for text in (word, f" {word}", f"\n{word}"):
            last = tokenizer.encode(text, add_special_tokens=False)[-1]
            if str(tokenizer.decode([last])).strip() == word:
                found.add(last)
    return sorted(found)
