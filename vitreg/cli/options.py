"""Options that several commands share, each defined once.

    @app.command()
    @with_options
    def diagnose(inputs: list[str], loading: Loading, reading: Reading) -> None: ...

A command takes a group of options as one argument; on the command line each field of the group is an option.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from rich.console import Console

from vitreg.models.names import SCHEMES

if TYPE_CHECKING:
    from vitreg.data.images import Images
    from vitreg.distributed import Ranks
    from vitreg.models.backbone import Backbone

IMAGES_HELP = "A folder, a file, a glob, a .txt list of paths, or webdataset .tar shards."


def _size(text: str) -> tuple[int, int]:
    from vitreg.models.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=f"{SCHEMES}.")]
ImagesArgument = Annotated[str, typer.Argument(metavar="IMAGES", help=IMAGES_HELP)]
SavedFix = Annotated[
    str | None, typer.Option("--fix", metavar="FIX", help="Apply a saved fix (folder or hub id) first.")
]
SettingsOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another setting; repeatable.")
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Images that the model is given at a time.")]
Workers = Annotated[int | None, typer.Option(metavar="N", min=0, help="Decoding processes.")]
Device = Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, mps or auto.")]
Dtype = Annotated[str, typer.Option(metavar="D", help="float32, bfloat16 or float16.")]
SizeOption = Annotated[
    Any,
    typer.Option(
        metavar="PX", parser=_size, help="Image side, or HEIGHTxWIDTH; positions are resampled accordingly."
    ),
]


@dataclass(frozen=True)
class BuildOptions:
    """How a model is built."""

    heading: ClassVar[str] = "The model"

    size: SizeOption = None
    random_weights: Annotated[bool, typer.Option(help="Build without a download, to try things out.")] = False
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that comes with a checkpoint of transformers.")
    ] = False

    def build(
        self, model: str, device: str, dtype: str, builder: "Callable[..., Backbone] | None" = None
    ) -> "Backbone":
        """The model, by `builder` or vitreg.load."""
        import vitreg

        with working(f"loading {model}"):
            return (builder or vitreg.load)(
                model,
                size=self.size,
                random_weights=self.random_weights,
                device=device,
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
            )


@dataclass(frozen=True)
class ModelOptions(BuildOptions):
    """How a model is built, and where and in which precision it computes."""

    device: Device = "auto"
    dtype: Dtype = "float32"

    def load(self, model: str, builder: "Callable[..., Backbone] | None" = None) -> "Backbone":
        return self.build(model, self.device, self.dtype, builder)


@dataclass(frozen=True)
class PhotoOptions:
    """How photos are read."""

    heading: ClassVar[str] = "The photos"

    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use the first N readable images.")
    ] = None
    batch_size: BatchSize = 32
    workers: Workers = None
    strict: Annotated[bool, typer.Option(help="Stop at the first image that cannot be read.")] = False

    def read(self, images: str, vit: "Backbone", ranks: "Ranks | None" = None) -> "Images":
        """The photos, with a progress bar; shared with other processes if `ranks` says so."""
        import vitreg

        return vitreg.read_images(
            images,
            vit,
            batch_size=self.batch_size,
            limit=self.limit,
            workers=self.workers,
            strict=self.strict,
            progress=True,
            **({} if ranks is None else {"ranks": ranks}),
        )


def working(on: str) -> AbstractContextManager[Any]:
    """A line on stderr that says what is being done, as long as it is."""
    return Console(stderr=True).status(on)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with each field of its option groups as an option of its own."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: group for name, group in hints.items() if is_dataclass(group)}

    def parsed(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    own = inspect.signature(command).parameters
    options = [_option(name, hints[name], own[name].default) for name in own if name not in groups]
    for group in groups.values():
        options += _options_of(group)
    parsed.__doc__, parsed.__name__ = command.__doc__, command.__name__
    parsed.__annotations__ = {option.name: option.annotation for option in options}
    parsed.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return parsed


def words_of(*groups: Any) -> list[str]:
    """What must be typed to get these option groups: those options that are not as by default."""
    words: list[str] = []
    for group in groups:
        hints = get_type_hints(type(group), include_extras=True)
        for field in fields(group):
            value = getattr(group, field.name)
            if value != field.default:
                option = declared(field.name, get_args(hints[field.name])[1])[-1]
                words += [option, *([] if value is True else [_typed(value)])]
    return words


def declared(name: str, option: Any) -> list[str]:
    """How an option is typed: as it was declared (in Annotated, typer takes the first name for a default), or
    by the name of its parameter."""
    names = [*([option.default] if isinstance(option.default, str) else []), *(option.param_decls or ())]
    return names or [f"--{name.replace('_', '-')}"]


def _typed(value: Any) -> str:
    """A value as it is typed; a size, which is a pair, as HEIGHTxWIDTH."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _options_of(group: Any) -> list[inspect.Parameter]:
    """An option for each field of a group, which all have defaults, under the group's heading in the help."""
    hints = get_type_hints(group, include_extras=True)
    options = []
    for field in fields(group):
        kind, option = get_args(hints[field.name])
        option = copy(option)
        option.rich_help_panel = group.heading
        options.append(_option(field.name, Annotated[kind, option], field.default))
    return options


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
