"""Llama, Mistral and a mixture of experts, pruned block by block with one block in hand.

    python examples/large_models.py           # 150 to 200 million weights each, minutes
    python examples/large_models.py --quick   # tiny ones, seconds

The architectures are those of ``transformers``, with random weights, so that nothing is downloaded:
what is shown is the way, and what it takes (on Linux). Every block is calibrated with what the
pruned blocks before it make of the data. Each expert of a mixture is calibrated with the tokens
that are routed to it. Memory is what the process takes beyond the model itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import purepruning as pp
from purepruning.stats import inputs
from purepruning_interop import torch as interop

SIZES = {
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 9,
    "num_attention_heads": 16,
}
QUICK = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
SPARSITY = 0.5

Pruner = Callable[..., tuple[dict[str, Tensor], Any]]


def wanda(params: Any, stats: Any, config: pp.Config) -> tuple[dict[str, Tensor], Any]:
    masks = pp.wanda(params, stats, config)
    return pp.apply_masks(params, masks), masks


def models(sizes: dict[str, int]) -> dict[str, tuple[Callable[[], nn.Module], Pruner, list[str]]]:
    """Returns what makes each model, by what it is pruned, and which totals that needs."""
    grouped = sizes | {"num_key_value_heads": sizes["num_attention_heads"] // 4}
    experts = grouped | EXPERTS | {"moe_intermediate_size": sizes["intermediate_size"] // 4}
    experts["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    return {
        "Llama, SparseGPT": (
            lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
            pp.sparse_gpt,
            ["grams"],
        ),
        "Mistral, Wanda": (
            lambda: MistralForCausalLM(MistralConfig(**grouped)),
            wanda,
            ["squares"],
        ),
        "Qwen-MoE, Wanda": (
            lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts)),
            wanda,
            ["squares"],
        ),
    }


def prune_model(
    model: nn.Module, batches: Iterable[Tensor], pruner: Pruner, keep: list[str]
) -> int:
    """Prunes all blocks in place; returns how many weights of their matrices are zero."""
    zeros = 0
    for turn in interop.blocks_in_turn(model, batches, at="model.layers", use_cache=False):
        table = layers(turn.block)
        params = {row.weight: turn.block.get_parameter(row.weight).detach() for row in table}
        stats = inputs.init(params, table, keep=keep)
        for args, kwargs in turn.calls:
            stats = inputs.update(stats, seen(turn.block, table, args, kwargs), table)
        config = pp.resolve([{"sparsity": SPARSITY}], table)
        params, _ = pruner(params, stats, config)
        turn.block.load_state_dict(params, strict=False)
        zeros += sum(int((x == 0).sum()) for x in params.values())
    return zeros


def layers(block: nn.Module) -> list[pp.Layer]:
    """Returns the matrices of a block; those of all experts are stacked in one parameter."""
    return [row for row in interop.layers(block) if row.type == "Linear"]


@torch.no_grad()
def seen(block: nn.Module, table: list[pp.Layer], args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Returns the inputs of all matrices; tokens that an expert is not given are zeros to it."""
    plain = [row.name for row in table if not row.stack_axes]
    _, found = interop.capture(block, *args, layers=plain, of="inputs", **kwargs)
    if len(plain) == len(table):
        return found
    given: list[Any] = []
    experts = block.get_submodule("mlp.experts")
    hook = experts.register_forward_pre_hook(lambda module, args: given.extend(args))
    block(*args, **kwargs)
    hook.remove()
    x, index = given[:2]
    routed = torch.stack([(index == e).any(-1) for e in range(len(experts.gate_up_proj))])
    each = x * routed[:, :, None]  # (experts, tokens, width)
    gate, up = torch.einsum("etd,emd->etm", each, experts.gate_up_proj).chunk(2, dim=-1)
    down = experts.act_fn(gate) * up
    return found | {"mlp.experts.gate_up_proj": each, "mlp.experts.down_proj": down}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, for a smoke test")
    arguments, console = parser.parse_args(), Console()
    sizes = QUICK if arguments.quick else SIZES
    view = Table(title=f"{SPARSITY:.0%} of the matrices of every block, one block in hand")
    for name in ("", "weights", "zeros", "seconds", "model, MB", "a block, MB", "beyond, MB"):
        view.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for name, (make, pruner, keep) in models(sizes).items():
        torch.manual_seed(0)
        model = make().eval()
        rng = torch.Generator().manual_seed(1)
        batches = [torch.randint(sizes["vocab_size"], (2, 64), generator=rng) for _ in range(4)]
        before, start = resident(), time.perf_counter()
        zeros = prune_model(model, batches, pruner, keep)
        beyond = peak() - before
        whole = sum(x.numel() for x in model.parameters())
        block = sum(x.numel() for x in model.model.layers[0].parameters())
        numbers = (4 * whole / 1e6, 4 * block / 1e6, beyond / 1e6)
        took = time.perf_counter() - start
        mb = (f"{x:,.0f}" for x in numbers)
        view.add_row(name, f"{whole:,}", f"{zeros:,}", f"{took:.0f}", *mb)
        del model
    console.print(view)


def resident() -> int:
    """Returns the bytes of memory that this process has now; the peak starts anew where it can."""
    with open("/proc/self/clear_refs", "w") as file:  # Linux
        file.write("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


if __name__ == "__main__":
    main()
