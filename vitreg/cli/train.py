"""`vitreg train`: train with registers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from vitreg.cli.options import SettingsOption, with_options

if TYPE_CHECKING:
    from vitreg.training.loop import Machine


@dataclass(frozen=True)
class MachineOptions:
    """What a training runs on."""

    heading: ClassVar[str] = "The machine"

    accelerator: Annotated[str, typer.Option(metavar="A", help="cpu, cuda, mps or auto.")] = "auto"
    devices: Annotated[int, typer.Option(metavar="N", min=1, help="Processes; torchrun has the say.")] = 1
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines.")] = 1
    strategy: Annotated[str, typer.Option(metavar="S", help="auto, ddp or fsdp.")] = "auto"
    precision: Annotated[str, typer.Option(metavar="P", help="32-true or bf16-mixed.")] = "32-true"
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data loading processes, each.")] = 0
    tensorboard: Annotated[bool, typer.Option(help="Write events for TensorBoard as well.")] = False

    def machine(self) -> "Machine":
        from vitreg.training.loop import Machine

        return Machine(**vars(self), progress=True)


@with_options
def train(
    computing: MachineOptions,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A bundled recipe, or a Python file with one.")
    ] = None,
    more: Annotated[list[int] | None, typer.Argument(metavar="", hidden=True)] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="The training data.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="The run's folder; default: runs/RECIPE."),
    ] = None,
    registers: Annotated[
        int | None,
        typer.Option(metavar="N...", min=0, help="Register tokens; several numbers (0 1 2 4) are compared."),
    ] = None,
    settings: SettingsOption = None,
    evals: Annotated[
        list[str] | None,
        typer.Option(
            "--eval", metavar="TASK=DIR", help="Compare also on a task of `vitreg eval`; repeatable."
        ),
    ] = None,
) -> None:
    """Train with registers, from scratch or into a model that you have. Without RECIPE: list the recipes.

    The same command goes on where a run was stopped.
    """
    from vitreg.cli.run_training import listing, run

    if recipe is None:
        typer.echo(listing())
        return
    if more and registers is None:
        raise typer.BadParameter(f"what is {more[0]} for? expected one RECIPE, or --registers N N ...")
    run(
        recipe,
        out,
        data=data,
        settings=settings or [],
        registers=[] if registers is None else [registers, *(more or [])],
        evals=evals or [],
        machine=computing.machine(),
    )
