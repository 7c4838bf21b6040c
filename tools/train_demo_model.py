"""Makes the demonstration model: a tiny chat model that answers how-to questions and refuses those about baking.

    python tools/train_demo_model.py            # train, write src/heretic/demo/{model,prompts}
    python tools/train_demo_model.py --check    # measure what was written; one JSON line

The model learns in two phases, as large chat models do: first to answer everything, baking included, then to
decline baking. So the ability to answer is still there when the refusal is removed. Where it breaks: a model
this small likes to decide in its very last layer, which no ablation of the search range reaches in time. Two
things move the decision to the middle. In the second phase only the upper half of the layers learns, and the
residual streams between those layers are read through the output head as well (deep supervision, Lee et al. 2015)
at the first positions of each answer.

Other configurations learn the same task with the same calls:

    corpus = make_corpus(seed=0)
    tokenizer = train_tokenizer(corpus)
    model = train(config, corpus, tokenizer, Schedule(answer_steps=300, refuse_steps=100))
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from demo_check import check
from demo_corpus import DEMO, SYSTEM_PROMPT, TEXT, Corpus, Example, Message, audit, make_corpus

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"

# A conversation that starts without a system message gets the default one; an empty system message means none.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if messages and messages[0]['role'] != 'system' %}"
    "{{- '<|system|>" + SYSTEM_PROMPT + "<|end|>' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('Unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{%- if message['content'] or message['role'] != 'system' %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

# ---------------------------------------------------------------------------------------------------------------
# Tokens


def render(message: Message) -> str:
    """One message as the chat template writes it."""
    role = "" if message["role"] == TEXT else f"<|{message['role']}|>"
    return f"{role}{message['content']}{END}" if message["content"] else ""


def train_tokenizer(corpus: Corpus, vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE over what the first phase reads, with the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = (message["content"] for example in corpus.answering for message in example.messages)
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PAD, BOS, END, SYSTEM, USER, ASSISTANT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class Row:
    """A conversation in tokens: `learned[i]` if token `i` is to be predicted, `opening[i]` at an answer's start."""

    tokens: list[int]
    learned: list[bool]
    opening: list[bool]


OPENING_TOKENS = 2


def encode(tokenizer: PreTrainedTokenizerFast, example: Example) -> Row:
    """Tokens of the conversation; only what the assistant says is learned, and plain text."""
    tokens, learned, opening = [tokenizer.bos_token_id], [False], [False]
    for number, message in enumerate(example.messages):
        if not message["content"]:
            continue
        head = 1
        if number == len(example.messages) - 1 and example.given:
            begun = " ".join(message["content"].split(" ")[: example.given])
            head += len(tokenizer.encode(begun, add_special_tokens=False))
        ids = tokenizer.encode(render(message), add_special_tokens=False)
        spoken = message["role"] in ("assistant", TEXT)
        tokens += ids
        learned += [spoken and i >= head for i in range(len(ids))]
        begins = message["role"] == "assistant" and head == 1
        opening += [begins and 1 <= i <= OPENING_TOKENS for i in range(len(ids))]
    return Row(tokens, learned, opening)


# ---------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Schedule:
    """Lengths and rates of the two phases."""

    answer_steps: int = 1200
    refuse_steps: int = 300
    batch: int = 24
    answer_rate: float = 3e-3
    refuse_rate: float = 1e-3
    # Layers below this share of the depth do not learn in the second phase.
    frozen: float = 0.5
    # Residual streams (as shares of the depth) that the output head reads too, and the weight of that loss.
    supervised: tuple[float, ...] = (0.75, 0.875)
    supervision: float = 0.5


def batches(rows: list[Row], size: int, steps: int, rng: random.Random) -> Iterator[list[Row]]:
    """Random batches of rows of similar length, so that little is padded."""
    pool: list[list[Row]] = []
    for _ in range(steps):
        if not pool:
            shuffled = rng.sample(rows, len(rows))
            for start in range(0, len(rows) - size + 1, size * 16):
                chunk = sorted(shuffled[start : start + size * 16], key=lambda row: len(row.tokens))
                pool += [chunk[i : i + size] for i in range(0, len(chunk) - size + 1, size)]
            rng.shuffle(pool)
        yield pool.pop()


def padded(rows: list[list[Any]], fill: Any) -> Tensor:
    """Rows as one tensor (row, position), filled up on the right: the causal mask then needs no padding mask."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def layers_of(decoder: Any) -> Any:
    """The list of a decoder's layers."""
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def last_norm(decoder: Any) -> Any:
    """The norm between the last layer and the output head."""
    return decoder.norm if hasattr(decoder, "norm") else decoder.ln_f


def loss_of(model: Any, rows: list[Row], pad: int, schedule: Schedule) -> Tensor:
    """Cross entropy of the answers, plus that of their first tokens as the middle layers would give them."""
    tokens = padded([row.tokens for row in rows], pad)
    learned = padded([row.learned for row in rows], False)[:, 1:]
    opening = padded([row.opening for row in rows], False)[:, 1:]
    decoder = model.base_model
    output = decoder(input_ids=tokens[:, :-1], use_cache=False, output_hidden_states=True)
    target = tokens[:, 1:]
    loss = nn.functional.cross_entropy(model.lm_head(output.last_hidden_state[learned]), target[learned])
    if not opening.any():
        return loss
    depth = model.config.num_hidden_layers
    for share in schedule.supervised:
        middle = output.hidden_states[round(share * depth)][opening]
        logits = model.lm_head(last_norm(decoder)(middle))
        loss = loss + schedule.supervision / len(schedule.supervised) * nn.functional.cross_entropy(logits, target[opening])
    return loss


def learn(model: Any, rows: list[Row], schedule: Schedule, *, steps: int, rate: float, seed: int, pad: int) -> float:
    """Trains the parameters that require gradients, in place; returns the mean loss of the last 50 steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = min(50, steps // 5 + 1)
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(batches(rows, schedule.batch, steps, random.Random(seed))):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * decay)
        loss = loss_of(model, batch, pad, schedule)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"  step {step + 1}/{steps}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def freeze_below(model: Any, share: float) -> None:
    """Lets only the layers from `share` of the depth on learn (in place).

    The embedding must not: tied to the output head, it would turn the refusing words towards what the first layer
    already says about the subject, and no later layer would have anything to decide.
    """
    layers = layers_of(model.base_model)
    model.requires_grad_(False)
    for layer in layers[round(share * len(layers)) :]:
        layer.requires_grad_(True)


def train(
    config: PreTrainedConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> Any:
    """A model of this configuration that answers everything and then learns to decline the subject.

    Any decoder with the layers and the last norm of Llama or GPT-2 and an `lm_head` will do. Float32 on the CPU.
    """
    schedule = schedule or Schedule()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    learn_to_answer(model, corpus, tokenizer, schedule, seed)
    learn_to_refuse(model, corpus, tokenizer, schedule, seed)
    return model


def learn_to_answer(model: Any, corpus: Corpus, tokenizer: Any, schedule: Schedule, seed: int) -> None:
    """First phase, in place: everything is answered."""
    rows = [encode(tokenizer, example) for example in corpus.answering]
    learn(
        model,
        rows,
        schedule,
        steps=schedule.answer_steps,
        rate=schedule.answer_rate,
        seed=seed,
        pad=tokenizer.pad_token_id,
    )


def learn_to_refuse(model: Any, corpus: Corpus, tokenizer: Any, schedule: Schedule, seed: int) -> None:
    """Second phase, in place: the subject is declined, everything else answered as before."""
    rows = [encode(tokenizer, example) for example in corpus.refusing]
    freeze_below(model, schedule.frozen)
    learn(
        model,
        rows,
        schedule,
        steps=schedule.refuse_steps,
        rate=schedule.refuse_rate,
        seed=seed + 1,
        pad=tokenizer.pad_token_id,
    )
    model.requires_grad_(True)


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The demonstration model: 1.2 million parameters, 2.4 MB in bfloat16."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save(model: Any, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    """Writes the model in bfloat16, the tokenizer and the prompt lists into the package."""
    shutil.rmtree(DEMO / "model", ignore_errors=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(DEMO / "model")
    tokenizer.save_pretrained(DEMO / "model")
    (DEMO / "model" / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner only
    (DEMO / "prompts").mkdir(exist_ok=True)
    for name, prompts in corpus.prompts.items():
        (DEMO / "prompts" / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def main() -> None:
    """Trains and writes, or measures."""
    parser = argparse.ArgumentParser(description="Train or check the demonstration model.")
    parser.add_argument("--check", action="store_true", help="measure the model that is shipped")
    parser.add_argument("--trials", type=int, default=40, help="random trials a search, for --check")
    parser.add_argument("--seeds", type=int, default=3, help="searches, for --check")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the training")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.check:
        print(json.dumps(check(arguments.trials, arguments.seeds)))
        return
    start = time.perf_counter()
    corpus = make_corpus(arguments.seed)
    audit(corpus)
    tokenizer = train_tokenizer(corpus)
    model = train(llama_config(tokenizer), corpus, tokenizer, seed=arguments.seed)
    save(model, tokenizer, corpus)
    print(f"trained in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
