"""Forward relevance propagation written out literally: a model run on values that carry their maps.

This is the slow twin of the compiler, written from the thesis and sharing no code with it; its operators are in
`reference_operators.py`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from reference_operators import (
    ACTIVATIONS,
    Carried,
    Cells,
    adaptive_avg_pool,
    adaptive_max_pool,
    add,
    affine,
    amax,
    avg_pool,
    batch_norm,
    cat,
    conv,
    conv_transpose,
    div,
    elementwise,
    linear,
    max_pool,
    mul,
    pad,
    prelu,
    sources,
    spread,
    sub,
    torch_function,
    view,
)

# fmt: off
VIEWS = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "swapaxes", "squeeze",
    "unsqueeze", "expand", "narrow", "select", "getitem", "contiguous", "clone", "detach", "chunk", "split", "unbind",
    "flip", "roll", "repeat", "tile", "pixel_shuffle",
}
LINEAR = {"sum", "mean", "neg", "cumsum", "interpolate", "upsample"}
SHAPES = {"size", "dim", "numel"}
BINARY: dict[str, Callable[..., Carried]] = {
    "add": add, "sub": sub, "mul": mul, "div": div, "truediv": div, "radd": add, "rmul": mul,
    "rsub": lambda a, b: sub(b, a), "subtract": sub, "multiply": mul, "divide": div,
}
FUNCTIONS: dict[str, Callable[..., Any]] = BINARY | {
    "cat": cat, "concat": cat, "pad": pad, "linear": linear, "amax": amax, "prelu": prelu,
    "batch_norm": batch_norm,
    "conv1d": conv, "conv2d": conv, "conv3d": conv, "conv_transpose1d": conv_transpose,
    "conv_transpose2d": conv_transpose, "conv_transpose3d": conv_transpose,
    "dropout": lambda a, *_, **__: a,
    "stack": lambda xs, dim=0: cat([view(x, lambda v: v.unsqueeze(dim)) for x in xs], dim),
} | {f"{pool.__name__}{dims}d": partial(pool, dims)
     for pool in (max_pool, avg_pool, adaptive_max_pool, adaptive_avg_pool) for dims in (1, 2, 3)}

# A module is its function with these attributes as options.
MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.Linear: ("linear", ("weight", "bias")), nn.PReLU: ("prelu", ("weight",)),
    nn.ReLU: ("relu", ()), nn.ReLU6: ("relu6", ()), nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.Threshold: ("threshold", ("threshold", "value")), nn.ELU: ("elu", ("alpha",)), nn.CELU: ("celu", ("alpha",)),
    nn.SELU: ("selu", ()), nn.GELU: ("gelu", ("approximate",)), nn.SiLU: ("silu", ()), nn.Mish: ("mish", ()),
    nn.Hardswish: ("hardswish", ()), nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.Softplus: ("softplus", ("beta", "threshold")), nn.Softsign: ("softsign", ()), nn.Tanh: ("tanh", ()),
    nn.Sigmoid: ("sigmoid", ()), nn.LogSigmoid: ("logsigmoid", ()), nn.Tanhshrink: ("tanhshrink", ()),
    nn.Hardshrink: ("hardshrink", ("lambd",)), nn.Softshrink: ("softshrink", ("lambd",)),
    nn.Flatten: ("flatten", ("start_dim", "end_dim")),
    nn.PixelShuffle: ("pixel_shuffle", ("upscale_factor",)), nn.Identity: ("dropout", ()), nn.Dropout: ("dropout", ()),
} | {getattr(nn, f"Dropout{d}d"): ("dropout", ()) for d in (1, 2, 3)
} | {getattr(nn, f"BatchNorm{d}d"): ("batch_norm", ("running_mean", "running_var", "weight", "bias", "eps"))
     for d in (1, 2, 3)
} | {getattr(nn, f"Conv{d}d"): (f"conv{d}d", ("weight", "bias", "stride", "padding", "dilation", "groups"))
     for d in (1, 2, 3)
} | {getattr(nn, f"ConvTranspose{d}d"): (f"conv_transpose{d}d", ("weight", "bias", "stride", "padding",
                                                                 "output_padding", "groups", "dilation"))
     for d in (1, 2, 3)
} | {getattr(nn, f"MaxPool{d}d"): (f"max_pool{d}d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode"))
     for d in (1, 2, 3)
} | {getattr(nn, f"AvgPool{d}d"): (f"avg_pool{d}d", ("kernel_size", "stride", "padding", "ceil_mode",
                                                     "count_include_pad")) for d in (1, 2, 3)
} | {getattr(nn, f"Adaptive{kind}Pool{d}d"): (f"adaptive_{kind.lower()}_pool{d}d", ("output_size",))
     for kind in ("Max", "Avg") for d in (1, 2, 3)}
# fmt: on


def carries(args: Any) -> bool:
    """Whether a Carried is anywhere among the arguments."""
    found: list[bool] = []
    fx.node.map_aggregate(args, lambda x: found.append(isinstance(x, Carried)))
    return any(found)


def evaluate(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of a PyTorch function on carried values, by the function's name."""
    a, *rest = args
    name = "logsigmoid" if name == "log_sigmoid" else name  # what F.logsigmoid is called inside
    if name == "getattr" or name in SHAPES:
        return function(a.value, *rest, **kwargs)
    if name == "getitem" and isinstance(a, tuple):
        return function(a, *rest)
    if name in FUNCTIONS:
        return FUNCTIONS[name](*args, **kwargs)
    if name in ACTIVATIONS:
        return elementwise(a, name, *rest, **kwargs)
    if name in VIEWS:
        return view(a, lambda v: function(v, *rest, **kwargs))
    if name in LINEAR:
        return affine(a, lambda v: function(v, *rest, **kwargs))
    raise NotImplementedError(f"the reference has no rule for {name}")


class AugmentedProxy(fx.Proxy):
    """A proxy that keeps `x += y` apart from `x + y`: the first one writes to x and to all that alias it."""

    def _augmented(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.itruediv, other)


class Tracer(fx.Tracer):
    """torch.fx's tracer, which on its own records `x += y` as `x + y`."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return AugmentedProxy(node, self)


class Reference(fx.Interpreter):
    """Runs a traced model on carried values, in place where the model does so; `record` keeps a copy of every node."""

    def __init__(self, graph_module: fx.GraphModule, record: dict[str, Carried] | None = None) -> None:
        super().__init__(graph_module)
        self.record = record

    def run_node(self, n: fx.Node) -> Any:
        """As in torch.fx, and noted: an in-place operator may change the value later."""
        result = super().run_node(n)
        if self.record is not None and isinstance(result, Carried):
            self.record[n.name] = Carried(result.value.clone(), result.maps.clone(), result.share)
        return result

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """torch.relu, F.relu, operator.add and operator.iadd are all known by name."""
        if not carries((args, kwargs)):
            return super().call_function(target, args, kwargs)
        augmented = getattr(target, "__module__", "") == "_operator" and target.__name__[1:] in BINARY
        name = target.__name__[1:] if augmented else target.__name__.strip("_")
        return self.finish(name, target, args, kwargs, in_place=augmented or target.__name__.endswith("_"))

    def call_method(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """x.relu() is torch.relu(x); x.relu_() writes to x."""
        if not carries((args, kwargs)):
            return super().call_method(target, args, kwargs)
        name = target.rstrip("_")
        return self.finish(name, getattr(torch.Tensor, name), args, kwargs, in_place=target.endswith("_"))

    def call_module(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A module is its function with options from its attributes."""
        module = self.fetch_attr(target)
        if not carries((args, kwargs)):
            return super().call_module(target, args, kwargs)
        name, attributes = MODULES[type(module)]
        options = {attribute: getattr(module, attribute) for attribute in attributes}
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return self.padded_conv(module, *args)
        if divisor := getattr(module, "divisor_override", None):
            options["divisor_override"] = divisor
        in_place = getattr(module, "inplace", False)
        return self.finish(name, torch_function(name), args, options, in_place=in_place)

    def padded_conv(self, module: Any, a: Carried) -> Carried:
        """A convolution over an input continued by copies of itself."""
        dims = module.weight.ndim - 2
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if module.padding == "same":
            widths = [(span // 2, span - span // 2) for span in spans]
        else:
            widths = [(p, p) for p in spread(0 if module.padding == "valid" else module.padding, dims)]
        continued = pad(a, [w for pair in reversed(widths) for w in pair], module.padding_mode)
        return conv(continued, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)

    def finish(self, name: str, function: Any, args: Any, kwargs: dict[str, Any], in_place: bool) -> Any:
        """Evaluates, and for an in-place call writes value and maps back, so that every alias sees them."""
        kwargs = dict(kwargs)
        in_place |= bool(kwargs.pop("inplace", False))
        result = evaluate(name, function, tuple(args), kwargs)
        if not in_place:
            return result
        args[0].value.copy_(result.value)
        args[0].maps.copy_(result.maps)
        return args[0]


def relevance_maps(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    *,
    cells: Cells = "elements",
    ledger: bool = False,
    record: dict[str, Carried] | None = None,
) -> Carried:
    """The output of one sample [1, ...] with the map of each of its neurons; `record` takes those of all nodes."""
    model = copy.deepcopy(model).double().eval()
    several = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with torch.no_grad():
        whole = nn.Sequential(model) if Tracer().is_leaf_module(model, "") else model
        traced = fx.GraphModule(whole, Tracer().trace(whole))
        return Reference(traced, record).run(*sources(several, cells, ledger))


def relevance(model: nn.Module, inputs: Tensor | Sequence[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """sum_o seed_o V_o, split over the inputs and shaped like them (T 4.1, 4.2 for a unit seed)."""
    several = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    total = torch.einsum("o,on->n", seed.double().flatten(), relevance_maps(model, inputs).maps.flatten(0, -2))
    pieces = total.split([x.numel() for x in several])
    return tuple(piece.view_as(x) for piece, x in zip(pieces, several, strict=True))
