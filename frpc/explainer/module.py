"""What makes an explainer a module: state, devices, copies, files, and new weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from torch import Tensor, nn

from frpc.driver.programs import Programs
from frpc.errors import PickleRefusedError
from frpc.files import save

__all__ = ["ExplainerModule"]


class ExplainerModule(nn.Module):
    """The base of :class:`frpc.Explainer`: its state is the model's, and what is compiled follows from it."""

    def __init__(self, programs: Programs) -> None:
        super().__init__()
        self.programs = programs

    @property
    def model_name(self) -> str:
        """Class name of the model."""
        return self.programs.model_name

    @property
    def model(self) -> nn.Module:
        """The copy of the model that is explained, in evaluation mode."""
        return self.programs.model

    def save(self, path: str | Path, *, columns: bool = True, weights: str = "stored") -> Path:
        """Writes the compiled programs to one file that :func:`frpc.load` reads, without the model's class and without pickle.

        The file holds every program compiled so far: those for calls with one target are always among them.

        Args:
            path: the file; ``.frpc`` by custom. One that exists is replaced at once, never in part.
            columns: also holds the program for K targets a sample.
            weights: ``"stored"`` in the file, or by ``"reference"``: the file then holds their names and checksums, and is
                loaded with a model that has them.

        Raises:
            InputError: if nothing is compiled yet.
            ProgramFileError: if a program calls an operator that is not PyTorch's; names it.
        """
        return save(self.programs, path, columns, weights)

    def refresh(self, model: nn.Module) -> Self:
        """Takes new weights of the model that it was compiled from, e.g. after training, without capturing the model again.

        All programs are compiled again from the captured graph; calls from other threads use the old weights until then.

        Args:
            model: the module; it is copied again.

        Raises:
            WeightsError: if a parameter is missing, or has another shape, dtype or device.
            CompileError: if the model's code computes something else than what was captured.
        """
        self.programs.refresh(model)
        return self

    def state_dict(  # type: ignore[override]  # positional arguments are deprecated, and still passed by some
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The model's state dict, with the model's own names; compiled programs are derived from it."""
        found: dict[str, Any] = self.programs.model.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return found

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads the model's state, and compiles all programs again."""
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        model = copy.deepcopy(self.programs.model)
        try:
            fitting = model.load_state_dict(own, strict=False)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys.extend(prefix + name for name in fitting.missing_keys)
        unexpected_keys.extend(prefix + name for name in fitting.unexpected_keys)
        self.programs.refresh(model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to another device or type; the next call captures and compiles there."""
        self.programs.convert(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)(self.programs.copied(memo))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PickleRefusedError(
            "An explainer cannot be pickled, because opening a pickle can run code. Save it with explainer.save(path), and load "
            "it with frpc.load(path); or send the model, and compile it there."
        )
