"""The emulated accelerator itself: it finds tensors of different devices that meet, and computes what the CPU computes."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tiny
from emulated import DeviceTensor, Emulation

MIB = 2**20


@pytest.fixture
def emulation() -> Iterator[Emulation]:
    with Emulation((64 * MIB, 64 * MIB)) as emulation:
        yield emulation


def here(*shape: int) -> Tensor:
    return torch.ones(*shape)


def there(*shape: int, device: str = "cuda:0") -> Tensor:
    return torch.ones(*shape, device=device)


def tokens(device: str) -> Tensor:
    return torch.tensor([0, 1], device=device)


# Each is right if both devices are the same.
MIXED: dict[str, Callable[[str, str], Any]] = {
    "add": lambda a, b: there(3, device=a) + there(3, device=b),
    "compare": lambda a, b: there(3, device=a) == there(3, device=b),
    "multiply in place": lambda a, b: there(3, device=a).mul_(there(3, device=b)),
    "where": lambda a, b: torch.where(there(3, device=a) > 0, there(3, device=a), there(3, device=b)),
    "masked fill": lambda a, b: there(3, device=a).masked_fill(there(3, device=b) > 0, 2.0),
    "matrix product": lambda a, b: there(2, 3, device=a) @ there(3, 2, device=b),
    "batched product": lambda a, b: torch.bmm(there(2, 2, 2, device=a), there(2, 2, 2, device=b)),
    "addmm": lambda a, b: torch.addmm(there(2, device=a), there(2, 2, device=a), there(2, 2, device=b)),
    "linear with a bias": lambda a, b: F.linear(there(2, 2, device=a), there(2, 2, device=a), there(2, device=b)),
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", there(2, 2, device=a), there(2, 2, device=b)),
    "concatenation": lambda a, b: torch.cat([there(3, device=a), there(3, device=b)]),
    "stack": lambda a, b: torch.stack([there(3, device=a), there(3, device=b)]),
    "gather": lambda a, b: there(3, device=a).gather(0, tokens(b)),
    "index select": lambda a, b: there(3, device=a).index_select(0, tokens(b)),
    "scatter": lambda a, b: there(3, device=a).scatter(0, tokens(b), there(2, device=a)),
    "index copy": lambda a, b: there(3, device=a).index_copy_(0, tokens(a), there(2, device=b)),
    "put values": lambda a, b: there(3, device=a).index_put_((tokens(a),), there(2, device=b)),
    "embedding": lambda a, b: F.embedding(tokens(b), there(3, 2, device=a)),
    "layer norm": lambda a, b: F.layer_norm(there(3, device=a), (3,), there(3, device=b)),
    "attention": lambda a, b: F.scaled_dot_product_attention(*[there(1, 1, 2, 2, device=d) for d in (a, b, a)]),
    "a module elsewhere": lambda a, b: nn.RMSNorm(2).to(a)(there(1, 2, device=b)),
    "a number of the other device": lambda a, b: there(3, device=a) + torch.tensor(1.0, device=b),
}
CPU_NUMBER = {"a number of the other device"}


@pytest.mark.parametrize(("a", "b"), [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:1")])
@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_meet(emulation: Emulation, name: str, a: str, b: str) -> None:
    if name in CPU_NUMBER and b == "cpu":
        assert MIXED[name](a, b).device == torch.device(a)
        return
    with pytest.raises(RuntimeError, match=r"Expected .* (be on|have) the same device"):
        MIXED[name](a, b)


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_one_device_do(emulation: Emulation, name: str, device: str) -> None:
    result = MIXED[name](device, device)
    assert result.device == torch.device(device) and isinstance(result, DeviceTensor) == (device != "cpu")
    torch.testing.assert_close(result.cpu(), MIXED[name]("cpu", "cpu"))


def test_indices(emulation: Emulation) -> None:
    x = there(3)
    x[[0, 2]] = 5
    x[[]] = 7
    assert x.tolist() == [5, 1, 5] and x[[True, False, True]].tolist() == [5, 5]
    assert there(3)[tokens("cpu")].device == torch.device("cuda:0")
    with pytest.raises(RuntimeError, match=r"indices should be either on cpu or on the same device as the indexed tensor \(cpu\)"):
        here(3)[tokens("cuda:0")]
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        there(3)[tokens("cuda:1")]
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        here(3)[there(3) > 0] = 1


def test_copies_go_anywhere(emulation: Emulation) -> None:
    for a in ("cpu", "cuda:0", "cuda:1"):
        for b in ("cpu", "cuda:0", "cuda:1"):
            target = torch.zeros(2, 3, device=a)
            target[:, 1] = there(2, device=b)
            assert target.tolist() == [[0, 1, 0], [0, 1, 0]]
            moved = target.to(b)
            assert moved.device == torch.device(b) and (moved is target) == (a == b)


def test_only_the_cpu_has_arrays(emulation: Emulation) -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there(3).numpy()
    assert there(3).cpu().numpy().tolist() == [1, 1, 1] == there(3).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.long])
def test_factories_go_where_they_are_asked_to(emulation: Emulation, dtype: torch.dtype) -> None:
    base = there(2).to(dtype)
    made = [
        torch.tensor([1, 2], dtype=dtype, device="cuda:1"),
        torch.as_tensor([1, 2], dtype=dtype, device="cuda:1"),
        torch.arange(1, 3, dtype=dtype, device="cuda:1"),
        base.new_tensor([1, 2], device="cuda:1"),
        torch.empty_like(base, device="cuda:1").copy_(torch.tensor([1, 2])),
        base.new_zeros(2, device="cuda:1") + torch.tensor([1, 2], dtype=dtype, device="cuda:1"),
    ]
    assert all((tensor.device, tensor.dtype, tensor.tolist()) == (torch.device("cuda:1"), dtype, [1, 2]) for tensor in made)
    assert {tensor.device for tensor in (base.new_tensor([1]), torch.zeros_like(base), base.new_empty(2))} == {torch.device("cuda:0")}
    assert torch.empty(1, device="cuda").device == torch.device("cuda:0")
    torch.cuda.set_device(1)
    assert torch.empty(1, device="cuda").device == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device="cuda:2")


def test_views_share_what_they_are_of(emulation: Emulation) -> None:
    x = torch.zeros(2, 3, device="cuda:0")
    before = emulation.memory.allocated[0]
    x[:, 1].add_(1)
    x.view(-1)[:1] = 5
    x.data = x.T.contiguous()
    assert x.tolist() == [[5, 0], [1, 1], [0, 0]] and emulation.memory.allocated[0] == before


@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_are_those_of_the_cpu(emulation: Emulation, recomputes: bool) -> None:
    """Through broadcasts, several uses, a function of one's own, an offloaded part, and layers computed twice."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *given: Any) -> Any:
            return 2 * given[0]

    torch.manual_seed(0)
    weight, bias, tokens = torch.randn(4, 4), torch.randn(1, 4), torch.tensor([0, 2, 2])

    def gradients(device: str, other: str) -> list[Tensor]:
        w, b = weight.clone().to(device).requires_grad_(), bias.clone().to(other).requires_grad_()

        def work(x: Tensor) -> Tensor:
            return F.silu(x @ w + b.to(device)) * Twice.apply(w[0])

        x = F.embedding(tokens.to(device), w)
        x = checkpoint(work, x, use_reentrant=False) if recomputes else work(x)
        loss = torch.log_softmax(x.to(other), dim=-1)[:, 1].sum() + w.float().square().mean().to(other)
        (again,) = torch.autograd.grad(loss, [w], retain_graph=True)
        loss.backward()
        assert w.grad is not None and w.grad.device == w.device and torch.equal(w.grad.cpu(), again.cpu())
        assert b.grad is not None
        return [w.grad.cpu(), b.grad.cpu()]

    expected = gradients("cpu", "cpu")
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:0", "cpu")):
        torch.testing.assert_close(gradients(*devices), expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_model_computes_the_same(emulation: Emulation, model_type: str) -> None:
    model = tiny.build(model_type)
    ids = torch.tensor([[3, 8, 9, 10]])
    expected = model.generate(ids, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    model.to("cuda:1")
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        model(ids)
    found = model.generate(ids.to("cuda:1"), max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    torch.testing.assert_close([logits.cpu() for logits in found.logits], list(expected.logits))


def test_memory(emulation: Emulation) -> None:
    x = torch.zeros(MIB, device="cuda:0")
    y = x.view(2, -1)[0]
    assert emulation.memory.allocated == [4 * MIB, 0] == [torch.cuda.memory_allocated(i) for i in range(2)]
    del x
    assert emulation.memory.allocated == [4 * MIB, 0], "a view keeps it"
    assert torch.accelerator.get_memory_info(0) == (60 * MIB, 64 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate 61.00 MiB"):
        torch.zeros(61 * MIB, dtype=torch.uint8, device="cuda:0")
    del y
    gc.collect()
    assert torch.cuda.memory_allocated(0) == 0 and torch.cuda.memory_reserved(0) == 4 * MIB
    torch.accelerator.empty_cache()
    assert torch.cuda.mem_get_info(0) == (64 * MIB, 64 * MIB) and torch.cuda.max_memory_allocated(0) == 4 * MIB


def test_an_allocation_fails_when_told_to() -> None:
    with Emulation((MIB,), fails=lambda n_bytes: n_bytes == 12) as emulation:
        torch.zeros(2, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(3, device="cuda")
        assert emulation.memory.n_failed == 1 and emulation.memory.allocated == [0]


WAITS: list[tuple[Callable[[], Any], int]] = [
    (lambda: there(3)[0].item(), 1),  # noqa: PLW0108
    (lambda: there(3).tolist(), 1),
    (lambda: there(3).cpu(), 1),
    (lambda: bool(there(1) > 0), 1),
    (lambda: (there(3) > 0).all().item(), 1),
    (lambda: there(3)[there(3) > 0], 1),
    (lambda: there(3).nonzero(), 1),
    (lambda: there(3).masked_select(there(3) > 0), 1),
    (lambda: there(3)[tokens("cpu")], 2),  # `tokens` and the copy of an index
    (lambda: here(3).to("cuda:0"), 1),
    (lambda: here(3).to("cuda:0", non_blocking=True), 1),
    (lambda: here(3).pin_memory().to("cuda:0"), 1),
    (lambda: there(3).copy_(here(3)), 1),
    (lambda: torch.accelerator.synchronize(), 1),  # noqa: PLW0108  # the one that the emulation has put there
    (lambda: here(3).pin_memory().to("cuda:0", non_blocking=True), 0),
    (lambda: there(3).copy_(here(3).pin_memory(), non_blocking=True), 0),
    (lambda: there(3).to("cuda:1"), 0),
    (lambda: there(3) + 1, 0),
    (lambda: there(3).masked_fill_(there(3) > 0, 1.0), 0),
    (lambda: there(3)[1:], 0),
    (lambda: here(3)[here(3) > 0].tolist(), 0),  # noqa: PLW0108
]


@pytest.mark.parametrize("i", range(len(WAITS)))
def test_synchronizations_are_counted(emulation: Emulation, i: int) -> None:
    work, expected = WAITS[i]
    work()
    n_of_tokens = 1 if expected == 2 else 0
    assert emulation.counts.waits.total() == expected - n_of_tokens
    assert all("test_emulated_device.py:" in origin for origin in emulation.counts.waits)


def test_launches_are_counted(emulation: Emulation) -> None:
    x, weight = there(2, 3), there(3, 3)
    emulation.counts.clear()
    y = torch.empty_like(x)
    (x.T.view(3, 2).T @ weight).add_(1)
    y[:, :2].copy_(x[:, :2])
    assert emulation.counts.launches == {"mm": 1, "add_": 1, "copy_": 1}
    here(3) + 1
    assert emulation.counts.launches.total() == 3


def test_threads_have_it_too(emulation: Emulation) -> None:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(here(3).to("cuda:1") * 2))
    thread.start()
    thread.join()
    assert found[0].device == torch.device("cuda:1") and found[0].tolist() == [2, 2, 2]


def test_nothing_is_left() -> None:
    before = [torch.cuda.is_available(), torch.cuda.device_count, torch.accelerator.get_memory_info, torch.autograd.grad]
    with Emulation():
        assert torch.cuda.is_available() and torch.accelerator.current_accelerator() == torch.device("cuda")
        x = there(3)
    assert before == [torch.cuda.is_available(), torch.cuda.device_count, torch.accelerator.get_memory_info, torch.autograd.grad]
    with pytest.raises(RuntimeError, match="outside of its emulation"):
        x + 1
