"""Memory and throughput of a merged export: a synthetic Llama checkpoint in shards, every writer edited, beside plain copies of its files.

python bench/export.py             # 8 GB of bfloat16 in 2 GB shards; needs twice its size free on --folder; one JSON line
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from heretic.config import Settings
from heretic.editing.architecture import Storage
from heretic.loading.source import ModelSource
from heretic.saving.edits import Edit
from heretic.saving.export import write_export
from heretic.saving.original import Original, open_original
from heretic.saving.stored import Shard, StoredModel, computed_tensor, resharded, write_stored
from heretic.utils import SilentProgress


def make_checkpoint(folder: Path, layers: int, hidden_size: int, shard_size: str) -> int:
    """Write a Llama of random weights without holding more than one of them; its bytes."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_attention_heads=hidden_size // 128 or 1,
        num_key_value_heads=hidden_size // 512 or 1,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    noise = torch.randn(2**20, dtype=torch.float32).to(torch.bfloat16)

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        n = torch.Size(shape).numel()
        return noise.repeat(n // len(noise) + 1)[:n].view(shape)

    tensors = tuple(computed_tensor(name, torch.bfloat16, shape, lambda shape=shape: weights(shape)) for name, shape in shapes.items())  # type: ignore[misc]
    stored = resharded(StoredModel((Shard("model.safetensors", tensors),), frozenset(), None), shard_size)
    write_stored(stored, folder, lambda name: None)
    return stored.n_bytes


def copy_seconds(source: Path, target: Path) -> float:
    """Copy all files as `cp` does and flush them to the disk."""
    start = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def memory() -> int:
    """Bytes of this process in memory now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def reset_peak() -> None:
    """Let the system count the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most bytes of this process that were in memory since `reset_peak`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def edits_of(original: Original, hidden_size: int) -> list[Edit]:
    """Every attention output and down-projection, at full strength."""
    r = torch.nn.functional.normalize(torch.randn(hidden_size), dim=0)
    writers = (name for name, _ in original.placements.model.named_modules() if name.endswith(("o_proj", "down_proj")))
    return [Edit(name, Storage(), r, 1.0) for name in writers]


def main() -> None:
    """Alternates copies and exports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--shard-size", default="2GB")
    parser.add_argument("--mode", default="full", choices=["none", "pre", "full"])
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="heretic-bench-") as temporary:
        source = Path(temporary) / "original"
        source.mkdir()
        n_bytes = make_checkpoint(source, arguments.layers, arguments.hidden_size, arguments.shard_size)
        idle, peaks, copies, exports, cpu = memory(), [], [], [], []
        for round_number in range(arguments.rounds):
            copies.append(copy_seconds(source, Path(temporary) / "copy"))
            target = Path(temporary) / f"edited-{round_number}"
            target.mkdir()
            reset_peak()
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            original = open_original(ModelSource(str(source), "synthetic", None, False), SilentProgress())
            edits = edits_of(original, arguments.hidden_size)
            write_export(original, edits, Settings(model="m", row_normalization=arguments.mode), "merge", target, SilentProgress())
            exports.append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_SELF)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            peaks.append(peak() - idle)
            shutil.rmtree(target)
        copies.append(copy_seconds(source, Path(temporary) / "copy"))
    copied, exported = statistics.median(copies), statistics.median(exports)
    print(
        json.dumps(
            {
                "bytes": n_bytes,
                "mode": arguments.mode,
                "edited": len(edits),
                "peak_bytes_above_idle": max(peaks),
                "export_s": exported,
                "export_cpu_s": statistics.median(cpu),
                "copy_s": copied,
                "export_bytes_per_s": n_bytes / exported,
                "copy_bytes_per_s": n_bytes / copied,
                "ratio": exported / copied,
            }
        )
    )


if __name__ == "__main__":
    main()
