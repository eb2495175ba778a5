"""A failing call as a program of its own: :func:`script`."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..trie import Trie
from .calls import loss_and_gradient, token_logp_gradient
from .checks import KINDS, Finding, device_of
from .shrink import allowed, sequences, size

MOST = 4000  # numbers that are written out

_SAME = """

def same(x, y):
    plain = (t.clone(memory_format=torch.contiguous_format).flatten() for t in (x, y))
    return torch.equal(*(t.view(torch.uint8) for t in plain))
"""
_CALLS = {
    "token_logp_backward": inspect.getsource(token_logp_gradient) + "\n\ncall = token_logp_gradient\n",
    "sibling_grpo_loss": inspect.getsource(loss_and_gradient) + "\n\ncall = loss_and_gradient\n",
    "filter_items": "def call(bits, **given):\n    vstar_ops.filter_items(bits, **given)\n    return bits\n",
    "ved_select": "def call(trees, **given):\n    return vstar_ops.ved_select(trees, **given), trees\n",
    "ved_insert": "def call(trees, **given):\n    vstar_ops.ved_insert(trees, **given)\n    return trees\n",
}


def describe(found: Finding) -> str:
    """What is wrong, in a line."""
    p, what = found.problem, "result" + found.problem.where.removesuffix(".item()")
    if found.kind == "error":
        return f"raises {p.got}"
    if found.kind == "values":
        about = f" within {p.allowed:.2g}" if p.allowed else ""
        return f"{what} is {p.got!r}, expected {p.want!r}{about}"
    where = {"runs": "in a second run", "threads": "on another number of threads"}
    return f"{what} has other bits {where.get(found.kind, 'of a request alone')}"


def script(found: Finding) -> str:
    """A program that makes the call, and exits with an error as long as it fails."""
    device, name = device_of(found.backend), f'"{found.backend}"'
    written = size(found.call) <= MOST
    if written:
        made = _function("arguments", found.call.arguments, device)
        if found.kind == "batches":
            made += "\n\n" + _function("alone", found.call.request(_request(found)).arguments, device)
        call = _CALLS.get(found.op, f"def call(**given):\n    return vstar_ops.{found.op}(**given)\n")
    else:
        made = f"made = {found.origin}\n"
        call = f"def call(made):\n    return run({name}, made)\n"
    imports = "from math import inf, nan\n\nimport torch\n\nimport vstar_ops\n"
    if "generators.restricted(" in made:
        imports += "from vstar_ops.verify import generators\n"
    if not written:
        imports = "import numpy as np\nimport torch\n\nimport vstar_ops\n"
        imports += "from vstar_ops.verify import cases, sampling\nfrom vstar_ops.verify.checks import run\n"
    elif device != "cpu":
        imports += f'\ntorch.set_default_device("{device}")\n'
    helpers = _SAME if found.kind in KINDS[1:] else ""
    return (
        f'"""{found.op} on the backend {name}: {describe(found)}."""\n\n'
        f"from __future__ import annotations\n\n{imports}{helpers}\n\n{made}\n\n{call}\n\n"
        f"with vstar_ops.use_backend({name}):\n{_end(found, written)}"
    )


def _request(found: Finding) -> int:
    """Of a difference between a request alone and in its batch, ``[b : b + 1]``."""
    return int(found.problem.got[1:].partition(":")[0])


def _end(found: Finding, written: bool) -> str:
    p = found.problem
    first = "call(**arguments())" if written else "call(made)"
    if found.kind == "error":
        return f"    {first}\n"
    if found.kind == "values":
        right = "got == expected"
        if isinstance(p.want, float):
            right = "got != got" if p.want != p.want else f"{right} or abs(got - expected) <= {p.allowed!r}"
        return (
            f"    got = {first}{p.where}\nexpected = {p.want!r}\n"
            f'print(f"got {{got}}, expected {{expected}}")\nraise SystemExit(not ({right}))\n'
        )
    second, part, threads = first, "", ""
    if found.kind == "batches":
        second = "call(**alone())" if written else f"call(made.request({_request(found)}))"
        part = p.got
    elif found.kind == "threads":
        first, threads = f"(torch.set_num_threads(1), {first})[1]", "    torch.set_num_threads(2)\n"
    return (
        f"    one = {first}{p.where}{part}\n{threads}    others = [{second}{p.where} for _ in range(20)]\n"
        "right = all(same(one, other) for other in others)\n"
        'print("the same bits" if right else "other bits")\nraise SystemExit(not right)\n'
    )


def _function(name: str, arguments: dict[str, Any], device: str) -> str:
    lines = "".join(f'        "{k}": {literal(x, device)},\n' for k, x in arguments.items())
    return f"def {name}():\n    return {{\n{lines}    }}\n"


def literal(x: Any, device: str = "cpu") -> str:
    """Python that makes a value, with inf and nan by name."""
    if isinstance(x, Trie):
        rows = sequences(x).repeat_interleave(x.item_offset.diff().long().cpu(), 0)
        listed = rows.tolist() if len(rows) else f"torch.zeros({list(rows.shape)}, dtype=torch.int64)"
        moved = "" if device == "cpu" else f'.to("{device}")'
        trie = f"vstar_ops.Trie.from_sequences({listed}){moved}"
        return (
            trie if x.alive is None else f"generators.restricted({trie}, torch.tensor({allowed(x).tolist()}))"
        )
    if isinstance(x, Tensor):
        if x.numel() == 0:
            return f"torch.zeros({list(x.shape)}, dtype={x.dtype})"
        if x.is_contiguous() and x.storage_offset() == 0:
            return f"torch.tensor({x.tolist()}, dtype={x.dtype})"
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).tolist()
        laid = f"{list(x.shape)}, {x.stride()}, {x.storage_offset()}"
        return f"torch.tensor({memory}, dtype={x.dtype}).as_strided({laid})"
    names = [f.name for f in fields(x)] if is_dataclass(x) else getattr(x, "_fields", None)
    if names is not None:
        inner = "".join(f"            {name}={literal(getattr(x, name), device)},\n" for name in names)
        return f"vstar_ops.{type(x).__name__}(\n{inner}        )"
    return json.dumps(x) if isinstance(x, str) else repr(x)
