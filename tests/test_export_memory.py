"""An export's memory does not grow with the model: measured in a process of its own, by what the system says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_rebuild import make
from tiny import build, tokenizer
from tiny import save as save_original

MEASURE = """
import json, sys
from pathlib import Path
from heretic.commands.read_record import open_record
from heretic.commands.rebuild import rebuild
from heretic.utils import SilentProgress

def peak():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024

def run(stored, target):
    with open_record(stored) as record:
        rebuild(record, target, False, stored.removesuffix("-saved"), False, SilentProgress())

stored, target, small_stored, small_target = sys.argv[1:]
run(small_stored, small_target)  # now everything is imported
before = peak()
run(stored, target)
print(json.dumps({"before": before, "after": peak()}))
"""


@pytest.mark.long
def test_memory_of_a_model_of_several_shards(tmp_path: Path) -> None:
    """Less than a third of the model above a process that has exported a small one: a few times the largest tensor, and a buffer."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8, "head_dim": 64}
    model = build("llama", torch.bfloat16, **sizes)
    model.save_pretrained(tmp_path / "large", max_shard_size="20MB")
    save_original(tmp_path / "small", build("llama", torch.bfloat16))
    tokenizer().save_pretrained(tmp_path / "large")
    del model
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert n_bytes > 180e6 and len(list((tmp_path / "large").glob("*.safetensors"))) > 8
    make(tmp_path / "large", tmp_path / "large-saved", n_layers=24, size=512)
    make(tmp_path / "small", tmp_path / "small-saved")
    arguments = [tmp_path / name for name in ("large-saved", "large-again", "small-saved", "small-again")]
    output = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True).stdout
    peaks = json.loads(output)
    largest = 512 * 2048 * 4  # bytes in float32
    assert peaks["after"] - peaks["before"] < min(8 * largest + 2 * 2**24, n_bytes / 3)
    assert (tmp_path / "large-again" / "model.safetensors.index.json").is_file()
