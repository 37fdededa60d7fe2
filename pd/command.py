"""What all `pd` commands share: options that several take, how they fail, where they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pd.spec import ClusterSpec

DEFAULT_URL = "http://127.0.0.1:8000"

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A cluster spec (YAML).")]
Url = Annotated[str, typer.Option(help="A running server.")]
Key = Annotated[str, typer.Option(envvar="PAGERELAY_API_KEY", help="API key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Failure(Exception):
    """Printed as one line on stderr; the code is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def load_spec(path: Path) -> ClusterSpec:
    from pd import spec

    try:
        return spec.load_spec(path)
    except spec.SpecError as error:
        raise Failure(str(error).replace("\n", "\npd: "), 2) from error


def make_console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True)
