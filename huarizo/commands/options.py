"""Options that several commands share, each declared once."""

from typing import Annotated

import typer

RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or its name under runs/")]
ResultName = Annotated[str, typer.Argument(metavar="RUN", help="a run, or a PEFT adapter's folder or hub id")]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="FORMAT", help="prompt format, if not the run's own, such as alpaca")
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="MODEL", help="folder or hub id of the base model, if it has moved"),
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="of the base. auto: as in training, also int8 | float: the same, but instead of int8 the fastest of the "
        "others | bf16 | fp16 | fp32",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="replace an existing result")]
System = Annotated[str, typer.Option(help="system message of the conversation")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="maximum length of an answer, in tokens")]
Temperature = Annotated[float, typer.Option(min=0, help="sampling temperature; 0 = always the likeliest token")]
TopP = Annotated[float, typer.Option(help="sample from the likeliest tokens whose probabilities add up to this")]
TopK = Annotated[int, typer.Option(min=0, help="sample from this many of the likeliest tokens; 0 = all")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="values above 1 discourage repetition")]
Seed = Annotated[int | None, typer.Option(help="random seed of the sampling")]
