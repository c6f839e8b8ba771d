"""Does the sum of a map come out? One run of a program is checked: ``sum V + constants = <G, y>``, y being its own output.

In exact arithmetic the two are equal whatever the values are, because every rule reproduces its operator's result. Rounding
leaves at most a few units in the last place of ``sum |V|`` in trained nets; in a deep net with random weights, whose inner
relevances cancel, no formula says how many. So a difference above 64 units is not judged by its size. The same rules are run
operator by operator, in float64 and in the model's own type. If the sums differ in float64, a rule is wrong, and it is named. If
they do not, rounding explains what the model's own type loses there, and up to a hundred times that, because a program adds the
same numbers in another order. Methods that do not follow constants conserve nothing, and are not checked here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frpc.capture.batch import one_per_sample, place_of, spread_out
from frpc.driver.pipeline import Compiled
from frpc.driver.prepare import PreparedModel
from frpc.emit.audit import Audit, audit, widened
from frpc.errors import ConservationError

__all__ = ["Balance", "balance_of", "check_balance", "constants_share", "rounding_limit"]

_UNITS = 64  # roundings of sum|V| that need no further explanation
_EXACT = 1e-6  # of sum|V|, what rounding in float64 leaves at most
_OPERATOR = 4  # roundings of its operands that an operator's result is off: GELU at -8 is 1 + erf, and keeps no digit of it


@dataclass(frozen=True, eq=False)
class Balance:
    """The account of one run of a program, for each sample and column, ``[*K, B]``.

    Attributes:
        explained: ``<G, y>``.
        lost: ``sum V + constants - <G, y>``.
        errors: ``|lost|`` over ``sum |V|``, and ``|constants|`` where they are beside the map.
    """

    explained: Tensor
    lost: Tensor
    errors: Tensor


def balance_of(compiled: Compiled, functional: Tensor, results: Sequence[Tensor]) -> Balance | None:
    """Returns the account of one run; None where a method makes none, or the program speaks of inner layers.

    Shapes: functional and results as the program takes and gives them, columns first.
    """
    query, account = compiled.plan.query, compiled.assignment.account
    if not account.constants or account.reference is not None or query.layers:
        return None
    output, *maps, bias = results
    explained = query.top(functional, output, None) * output.double()
    if explained.dim() > bias.dim():
        explained = explained.sum(list(range(bias.dim(), explained.dim())))
    sums = [bias.double()] if query.bias == "separate" else []
    sizes = [s.abs() for s in sums]
    for m, batch in zip(maps, compiled.places, strict=True):
        rank = m.dim() - bias.dim() + 1
        sums.append(one_per_sample(m, rank, batch, torch.float64))
        sizes.append(one_per_sample(m.abs(), rank, batch, torch.float64))
    lost = sum(sums[1:], sums[0]) - explained
    # Where nothing is lost of nothing, nothing is wrong.
    size = sum(sizes[1:], sizes[0]).clamp_min(torch.finfo(torch.float64).tiny)
    return Balance(explained, lost, lost.abs() / size)


def constants_share(compiled: Compiled, results: Sequence[Tensor]) -> float | None:
    """Returns which part of all that maps assign is the constants', from 0 to 1; None where a method makes no such account.

    1 means that the maps say nothing of the input. With ``bias="receptive_field"`` the two overlap on the map, and constants are
    compared with the whole of it.
    """
    query, account = compiled.plan.query, compiled.assignment.account
    if not account.constants or query.layers:
        return None
    _, *maps, bias = results
    cells, owed = sum(m.numel() for m in maps) / max(1, bias.numel()), float(bias.double().abs().sum())
    rest = 0.0
    for m, batch in zip(maps, compiled.places, strict=True):
        evenly = spread_out(bias / cells, m.dim() - bias.dim() + 1, batch)
        rest += float((m - evenly if query.bias == "uniform" else m).double().abs().sum())
    if query.bias == "receptive_field":
        rest = max(0.0, rest - owed)
    return owed / (owed + rest) if owed else 0.0


def rounding_limit(prepared: PreparedModel) -> float:
    """What rounding may leave of an account without being asked, relative to ``sum |V|``; see the top of this file."""
    return min(_UNITS * prepared.rounding, 0.02)


def check_balance(
    balance: Balance, compiled: Compiled, prepared: PreparedModel, inputs: Sequence[Tensor], functional: Tensor, output: Tensor
) -> None:
    """Refuses an account that does not balance, unless rounding explains it.

    Raises:
        ConservationError: names the rule that is wrong, or the sample whose shares do not add up.
    """
    limit = rounding_limit(prepared)
    if float(balance.errors.max()) <= limit or not bool(torch.isfinite(output).all()):
        return
    place = int(torch.where(balance.errors.isnan(), torch.inf, balance.errors).argmax())
    explained, lost = float(balance.explained.flatten()[place]), float(balance.lost.flatten()[place])
    said = (
        f"The map does not add up: it sums to {explained + lost:.6g}, but the explained number is {explained:.6g} (sample "
        f"{place % balance.explained.shape[-1]}). That is {float(balance.errors.flatten()[place]):.1e} of sum|V|"
    )
    exact = audit(*widened(compiled.assignment, compiled.plan), [_wide(x) for x in inputs], functional.double())
    unit = _OPERATOR * torch.finfo(torch.float64).eps
    if not bool((exact.lost.abs() <= _EXACT * exact.size + unit * exact.resolution).all()):
        raise ConservationError(f"{said}; this is not a rounding error.\n{_cause(exact)}")
    own = audit(compiled.assignment, compiled.plan, inputs, functional)
    limit = max(limit, 100 * own.error)
    unit = _OPERATOR * prepared.rounding
    if not bool(((balance.errors <= limit) | (balance.lost.abs() <= unit * own.resolution)).all()):
        raise ConservationError(
            f"{said}; rounding explains {limit:.1e}. Each operator conserves relevance, so the compiled program is wrong: a "
            "bug in frpc."
        )


def _wide(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def _cause(exact: Audit) -> str:
    """Names the rule that loses most, or says that samples are taken for one another."""
    wrong = [node for node in exact.nodes if not node.error <= _EXACT]
    if not wrong:
        return (
            "  Every operator conserves relevance in total, but not per sample: constants are counted for other samples than "
            "they belong to. Keep samples in the first dimension."
        )
    worst = max(wrong, key=lambda node: math.inf if math.isnan(node.lost) else abs(node.lost))
    rule, node = worst.assigned.rule, worst.assigned.node
    own = rule.function.__module__.partition(".")[0] == "frpc"
    remedy = (
        "This is a rule of frpc: please report the bug."
        if own
        else "Fix it, or leave it out of overrides=; see docs/adding_a_rule.md."
    )
    return (
        f"  The rule {rule.name!r} of {node.target} passes on {worst.received - worst.lost:.6g} of {worst.received:.6g}:\n"
        f"    {place_of(node)}\n"
        f"  A rule must reproduce its operator's result, z = sum M_k a_k + c. {remedy}"
    )
