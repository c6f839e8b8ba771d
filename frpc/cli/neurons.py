"""`frpc neurons`: the maps of a layer's channels and of its strongest neurons, with the windows they see."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frpc.cli.classifier import ModelOption, load_classifier
from frpc.cli.neurons_record import RankedChannel, channel_portrait, layer_record, show_layer, size_in_words
from frpc.cli.session import Bias, BiasOption, Dtype, DtypeOption, JsonOption, Order, Session, ThreadsOption, session
from frpc.errors import OptionError, TargetError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from frpc.explainer.explainer import Explainer
    from frpc.integrations.images import Picture
    from frpc.layers.maps import LayerMaps
    from frpc.layers.strategies import LayerPlan
    from frpc.plots.neurons import Portrait
    from frpc.plots.outputs import OutputFolder
    from frpc.windows.producer import Grids

__all__ = ["neurons"]

Index = tuple[int, ...]


@dataclass(frozen=True)
class NeuronsRequest:
    """The command line of `frpc neurons`; see :func:`neurons`."""

    model: str
    weights: str
    image: Path
    layers: list[str]
    top: int
    by: Order
    chosen: list[Index]
    cell: int
    keep: bool
    bias: Bias
    dtype: Dtype


@dataclass(frozen=True, eq=False)
class AskedPhoto:
    """A picture as the model takes it, ``x`` ``[1, 3, H, W]``, and the explainer that is asked about it."""

    explainer: Explainer
    picture: Picture
    x: Tensor


def neurons(
    model: ModelOption,
    weights: Annotated[
        str, typer.Option(help="A safetensors file, or DEFAULT for torchvision's weights. Pickle files are not read.")
    ],
    image: Annotated[Path, typer.Option(help="A picture.")],
    layer: Annotated[list[str], typer.Option(help="Module path of a layer, e.g. features.3; repeat for several.")],
    top: Annotated[int, typer.Option(min=1, help="How many channels and how many neurons to show.")] = 12,
    by: Annotated[
        Order, typer.Option(help="Sort channels by sum |V| of their map, or by their largest value.")
    ] = Order.relevance,
    neuron: Annotated[
        list[str] | None, typer.Option(help="A neuron c,i,j to show instead of the strongest; repeat for several.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and JSON.")] = Path("frpc-neurons"),
    cell: Annotated[int, typer.Option(min=1, help="Side of the squares summed in pictures; 1 shows each pixel.")] = 4,
    save: Annotated[bool, typer.Option("--save", help="Also stream the windows of all neurons to safetensors files.")] = False,
    bias: BiasOption = Bias.uniform,
    dtype: DtypeOption = Dtype.float32,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the neurons of a layer see in a photo.

    For each layer: a picture with the maps of its strongest channels and of single neurons, each with the window of the
    photo it sees. By default the neurons are the strongest of each channel shown. Several layers get one more picture, with
    one neuron of each, if possible one whose window lies inside the photo.
    """
    with session(as_json, threads) as current:
        from frpc.plots.outputs import OutputFolder

        if bias is Bias.receptive_field:
            raise OptionError("frpc neurons supports only --bias uniform and --bias separate")
        chosen = [_index(text) for text in neuron or []]
        request = NeuronsRequest(model, weights, image, list(dict.fromkeys(layer)), top, by, chosen, cell, save, bias, dtype)
        folder = OutputFolder(out)
        result, plans = _run(request, folder, current)
        folder.json("neurons.json", result)
        for plan, entry in zip(plans, result["layers"], strict=True):
            show_layer(current.console, plan, entry)
        for file in folder.files:
            current.console.print(f"  {file}", markup=False)
        current.finish(result)


def _index(text: str) -> Index:
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){0,2}", text):
        raise OptionError(f"--neuron {text}: give a neuron as numbers, e.g. --neuron 5,7,7 (channel, row, column)")
    return tuple(int(number) for number in text.split(","))


def _run(request: NeuronsRequest, folder: OutputFolder, current: Session) -> tuple[dict[str, Any], list[LayerPlan]]:
    import torch

    from frpc.plots.neurons import depth_sheet

    with torch.no_grad(), current.progress() as progress:
        task = progress.add_task("reading", total=1 + len(request.layers))
        photo = _read(request, current)
        progress.update(task, advance=1, description="capturing")
        layers = []
        for name in request.layers:  # all are checked before the first is answered
            maps = photo.explainer.layer(name, photo.x)
            _check(maps, request, folder.path)
            layers.append(maps)
            progress.update(task, advance=1)
        progress.remove_task(task)
        entries: list[dict[str, Any]] = []
        widest: dict[str, Portrait] = {}
        for maps in layers:
            entry, portraits = _layer(request, photo, maps, folder, progress)
            entries.append(entry)
            if portraits:
                widest[maps.name] = max(portraits, key=lambda portrait: portrait.box.area if portrait.box else 0)
        if len(widest) > 1:
            title = f"{request.model}: one neuron of each layer, with the window it sees"
            folder.figure(
                "neurons_depth.png", depth_sheet(photo.picture.crop, widest, title=title, unit="value", cell=request.cell)
            )
    settings: dict[str, Any] = {"image": str(request.image), "model": request.model, "weights": request.weights}
    settings |= {"by": request.by.value, "bias": request.bias.value, "dtype": request.dtype.value}
    return settings | {"layers": entries}, [maps.plan for maps in layers]


def _read(request: NeuronsRequest, current: Session) -> AskedPhoto:
    import torch

    import frpc
    from frpc.integrations.images import prepare

    classifier = load_classifier(request.model, request.weights, request.dtype, current)
    picture = prepare(request.image, classifier.recipe)
    x = picture.pixels.to(getattr(torch, request.dtype))
    return AskedPhoto(frpc.compile(classifier.model, bias=request.bias.value), picture, x)


def _check(maps: LayerMaps, request: NeuronsRequest, folder: Path) -> None:
    from frpc.layers.files import check_disk

    sizes = list(maps.values.shape[1:])
    for index in request.chosen:
        if len(index) != len(sizes) or any(at >= size for at, size in zip(index, sizes, strict=True)):
            raise TargetError(f"--neuron {','.join(map(str, index))}: {maps.name} has neurons {sizes}, counted from 0")
    if request.keep:
        check_disk(maps, folder)


def _layer(
    request: NeuronsRequest, photo: AskedPhoto, maps: LayerMaps, folder: OutputFolder, progress: Progress
) -> tuple[dict[str, Any], list[Portrait]]:
    """Answers for one layer; returns its record, and its neurons' maps."""
    from frpc.plots.neurons import neuron_sheet

    start = time.perf_counter()
    task = progress.add_task(f"{maps.name}: channels", total=None)
    channels = _channels(request, maps, progress)
    progress.update(task, description=f"{maps.name}: neurons")
    window = _window(photo, maps)
    portraits = _neurons(request, photo, maps, channels, window)
    explained = time.perf_counter()
    progress.update(task, description=f"{maps.name}: pictures")
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", maps.name)
    linear = maps.values.dim() == 2
    what = "sum |V| of their map" if request.by is Order.relevance else "their largest value"
    figure = neuron_sheet(
        photo.picture.crop,
        [channel_portrait(channel, linear) for channel in channels],
        portraits,
        title=f"{maps.name} of {request.model}: {size_in_words(maps, window)}",
        channel_heading=f"{'Neurons' if linear else 'Channels, all their neurons added up'}: "
        f"the first {len(channels)} of {maps.values.shape[1]} by {what}",
        unit="value",
        cell=request.cell,
    )
    files = [str(folder.figure(f"neurons_{slug}.png", figure))]
    drawn = time.perf_counter()
    progress.remove_task(task)
    if request.keep:
        files.append(str(_save(maps, f"neurons_{slug}.safetensors", folder, progress)))
    seconds = {"explain": explained - start, "pictures": drawn - explained, "save": time.perf_counter() - drawn}
    return layer_record(maps, channels, portraits, window) | {"seconds": seconds, "files": files}, portraits


def _channels(request: NeuronsRequest, maps: LayerMaps, progress: Progress) -> list[RankedChannel]:
    """The first channels in the chosen order; by activation no other channel is computed."""
    values = maps.values[0].double().flatten(1) if maps.values.dim() > 2 else maps.values[0].double()[:, None]  # [C, positions]
    bias = maps.bias[0].double().reshape(values.shape)
    peaks = values.amax(1)
    wanted = list(range(len(values)))
    if request.by is Order.activation:
        wanted = peaks.argsort(descending=True, stable=True)[: request.top].tolist()
    ranked = []
    for number in progress.track(wanted, description=f"{maps.name}: maps of channels"):
        relevance = maps.channel(number)[0].double()
        outside = float(bias[number].sum()) if request.bias is Bias.separate else 0.0
        value, magnitude = float(values[number].sum()), float(relevance.abs().sum())
        error = abs(float(relevance.sum()) + outside - value) / max(magnitude + abs(outside), 1e-300)
        ranked.append(RankedChannel(number, value, float(peaks[number]), relevance, magnitude, error))
    if request.by is Order.relevance:
        ranked.sort(key=lambda channel: -channel.magnitude)
    return ranked[: request.top]


def _neurons(
    request: NeuronsRequest, photo: AskedPhoto, maps: LayerMaps, channels: list[RankedChannel], window: Grids
) -> list[Portrait]:
    """The chosen neurons, or else the strongest of each channel; none if channels are neurons."""
    from frpc.plots.neurons import Portrait, window_box

    indices = request.chosen or _strongest(request, maps, channels)
    if not indices:
        return []
    found = photo.explainer.neurons(maps.name, indices, photo.x)
    assert not isinstance(found.relevance, tuple), "the command hands over one picture"
    pixels = found.relevance[0].double().sum(1)  # [K, H0, W0]
    return [
        Portrait(f"({', '.join(map(str, index))})", float(value), relevance, window_box(window, maps.cells, _position(index)))
        for index, value, relevance in zip(indices, found.output[0], pixels, strict=True)
    ]


def _strongest(request: NeuronsRequest, maps: LayerMaps, channels: list[RankedChannel]) -> list[Index]:
    import torch

    if maps.values.dim() == 2:
        return []
    indices = []
    for channel in channels:
        values = maps.values[0, channel.number]
        place = int((values if request.by is Order.activation else values.abs()).argmax())
        indices.append((channel.number, *(int(at) for at in torch.unravel_index(torch.tensor(place), values.shape))))
    return indices


def _position(index: Index) -> tuple[int, int]:
    """Row and column of an index; one spatial axis counts as columns."""
    return (0, 0) if len(index) == 1 else (0, index[1]) if len(index) == 2 else (index[1], index[2])


def _window(photo: AskedPhoto, maps: LayerMaps) -> Grids:
    """The windows' geometry, also where another strategy than windows is cheaper."""
    if maps.plan.strategy == "windows" or maps.plan.ended:
        return maps.window
    return photo.explainer.layer(maps.name, photo.x, strategy="windows").window


def _save(maps: LayerMaps, name: str, folder: OutputFolder, progress: Progress) -> Path:
    from frpc.layers.files import write_blocks

    task = progress.add_task(f"{maps.name}: windows of neurons", total=len(maps))
    path = folder.file(name, lambda path: write_blocks(maps, path, lambda count: progress.update(task, advance=count)))
    progress.remove_task(task)
    return path
