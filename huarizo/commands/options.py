"""Options that several commands share, each declared once."""

from typing import Annotated

import typer

RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or its name under runs/")]
ResultName = Annotated[str, typer.Argument(metavar="RUN", help="a run, or the folder or hub id of a PEFT adapter")]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="FORMAT", help="prompt format, where it is not the run's: alpaca ...")
]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", metavar="MODEL", help="folder or hub id of the base, where it has moved")
]
Force = Annotated[bool, typer.Option("--force", help="replace what is there")]
System = Annotated[str, typer.Option(help="a system message in front of the conversation")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(min=0, help="0 = the likeliest token every time")]
TopP = Annotated[float, typer.Option(help="draw from the likeliest tokens of this probability together")]
TopK = Annotated[int, typer.Option(min=0, help="draw from so many likeliest tokens; 0 = all")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="above 1: say less twice")]
Seed = Annotated[int | None, typer.Option(help="of the draw")]
