"""Random models as people write them: the right output, an account that balances, autograd's gradients; or a line is named."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import frpc
from frpc.errors import FrpcError
from user_models import Program
from user_programs import Writer

pytestmark = pytest.mark.filterwarnings("ignore")  # of user code, which may be clumsy


@st.composite
def programs(draw: Any, statements: int = 8) -> Program:
    return Writer(lambda options: draw(st.sampled_from(list(options))), statements).write()


def drawn(seed: int, statements: int = 8) -> Program:
    return Writer(random.Random(seed).choice, statements).write()


def explained(model: nn.Module, program: Program, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own answer, ``[B, K]``."""
    found = model(**inputs)
    if program.output is not None:
        return found[program.output]
    return found["logits"] if isinstance(found, dict) else found


def by_autograd(
    model: nn.Module, program: Program, inputs: dict[str, Tensor], target: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The values that relevance is asked about (inputs, or the embeddings of whole numbers), their gradients, and the output."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if args[0].dim() == 2:  # ids, not positions
            seen.append(output.detach().requires_grad_())
            return seen[-1]
        return output

    leaves = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    hooks = [part.register_forward_hook(keep) for part in model.modules() if isinstance(part, nn.Embedding)]
    output = explained(model, program, leaves)
    for hook in hooks:
        hook.remove()
    values = [x for x in leaves.values() if x.requires_grad] + seen
    chosen = output.gather(1, target[:, None]).sum()
    slopes = torch.autograd.grad(chosen, values, allow_unused=True) if chosen.requires_grad else [None] * len(values)
    slopes = [torch.zeros_like(v) if s is None else s for v, s in zip(values, slopes, strict=True)]
    return [v.detach() for v in values], slopes, output.detach()


def total(maps: list[Tensor]) -> Tensor:
    return sum(m.flatten(1).sum(1) for m in maps)  # type: ignore[return-value]


def size(maps: list[Tensor]) -> Tensor:
    return sum(m.abs().flatten(1).sum(1) for m in maps)  # type: ignore[return-value]


def ask(explainer: frpc.Explainer, program: Program, inputs: dict[str, Tensor], target: Tensor) -> tuple[Tensor, list[Tensor]]:
    found = explainer(**inputs, target=target) if program.named else explainer(*inputs.values(), target=target)
    return found.output, list(found.relevance) if isinstance(found.relevance, tuple) else [found.relevance]


def compiled(model: nn.Module, program: Program, **options: Any) -> frpc.Explainer:
    example = program.draw(program.example, 0)
    given: Any = None if program.lazy else example if program.named else tuple(example.values())
    return frpc.compile(model, given, output=program.output, **options)


def close(a: Tensor, b: Tensor) -> bool:
    """In float64: rounding and another order of sums, and nothing else."""
    return bool(((a - b).abs() <= 1e-9 * (1 + b.abs().max())).all())


def check(program: Program) -> None:
    """Raises AssertionError for a wrong answer, and FrpcError for a refusal."""
    model = program.build()
    whole, slope = compiled(model, program), compiled(model, program, method="gradient-input")
    for batch in [program.fixed] if program.fixed else [2, 3, 1]:
        inputs = program.draw(batch, 10 + batch)
        count = explained(model, program, inputs).shape[1]
        target = torch.arange(batch) % count
        values, gradients, expected = by_autograd(model, program, inputs, target)
        output, maps = ask(whole, program, inputs, target)
        number = expected.gather(1, target[:, None])[:, 0]
        assert close(output, expected), "the output is not the model's"
        # x - x inside a program leaves a number of 1e-16 and a map of 0: the rounding of values near 1, and no share of anything
        assert bool(((total(maps) - number).abs() <= 1e-10 * size(maps) + 1e-13).all()), "the account does not balance"
        _, found = ask(slope, program, inputs, target)
        assert len(found) == len(values) == len(maps)
        for one, value, gradient in zip(found, values, gradients, strict=True):
            assert close(one, value * gradient), "gradient x input is not autograd's"
        if program.linear:
            cells = sum(v[0].numel() for v in values)
            rest = (number - total([v * g for v, g in zip(values, gradients, strict=True)])) / cells
            for one, value, gradient in zip(maps, values, gradients, strict=True):
                assert close(one, value * gradient + rest.reshape(-1, *[1] * (value.dim() - 1))), "the map is another"


LINE = re.compile(r"user_program_\w+\.py:\d+")


def judge(program: Program) -> str | None:
    """None where the program is explained rightly; the message where it is refused, naming a line."""
    try:
        check(program)
    except FrpcError as refusal:
        message = f"{type(refusal).__name__}: {refusal}"
        assert LINE.search(message), f"a refusal that names no line: {message}\n{program.source}"
        return message
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{program}\n{program.source}") from error
    return None


QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)


@given(programs(statements=6))
@settings(QUIET, max_examples=12, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_programs_as_people_write_them(program: Program) -> None:
    judge(program)


@pytest.mark.slow
@pytest.mark.timeout(14_400)
def test_a_thousand_programs() -> None:
    """None is explained wrongly, at most one in twenty is refused, and each refusal names a line."""
    refused: list[str] = []
    asked = 0

    @given(programs())
    @settings(QUIET, max_examples=1000, database=None)
    def run(program: Program) -> None:
        nonlocal asked
        asked += 1
        if (message := judge(program)) is not None:
            refused.append(message)

    run()
    assert asked >= 1000
    assert len(refused) <= 0.05 * asked, "\n".join(refused)
