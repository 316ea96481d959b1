"""Prints rows as the model sees them: what it reads, what it learns, and how many tokens each has."""

from itertools import groupby

from rich.console import Console
from rich.text import Text

from huarizo.data.dataset import Data
from huarizo.data.tokens import IGNORED, Example


def show_examples(console: Console, data: Data, count: int) -> None:
    """Print the notes on the data, then the first `count` examples.

    Learnt text is green; without colours it is put between « and ».
    """
    tokenizer = data.encoder.tokenizer
    for note in data.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    console.print(
        Text.assemble("read by the model, ", ("learnt by the model", "green"), " (between « and » without colours)")
    )
    for tokenised in data.train.first(count):
        row = data.rows[tokenised["row"]]
        example = Example.from_row(tokenised)
        tokens = list(zip(example.input_ids, example.labels, strict=True))
        learnt = sum(label != IGNORED for _, label in tokens)
        console.print(
            Text(f"\n--- {row.file}, row {row.number}: {len(tokens)} tokens, {learnt} of them learnt", "bold")
        )
        text = Text()
        for is_learnt, run in groupby(tokens, key=lambda token: token[1] != IGNORED):
            shown = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
            marked = f"«{shown}»" if is_learnt and not console.color_system else shown
            text.append(marked, style="green" if is_learnt else "")
        console.print(text, soft_wrap=True)
