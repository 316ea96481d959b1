"""Fine-tune TinyLlama with LoRA on Alpaca data, in the tutorial's six steps.

    python3 script.py alpaca_data.json     TinyLlama from the hub on your own Alpaca file
    python3 script.py --quickstart         a small model and data that need no hub, no token and no GPU

`huarizo train RECIPE` does the same and more: held-out loss, answers before and after, checkpoints that survive a kill.
"""

import sys

from rich.console import Console

from huarizo.data.prompts import prompt_format
from huarizo.data.rows import read_rows, require_good
from huarizo.data.tokens import Encoder, tokenise
from huarizo.events import Events
from huarizo.host import cache_folder
from huarizo.hub.names import resolve_data, resolve_model
from huarizo.machine import device
from huarizo.model.load import load_tokenizer
from huarizo.model.lora import add_lora, count_weights
from huarizo.plan import choose_precision
from huarizo.recipe import make_recipe
from huarizo.runs import new_run
from huarizo.training.loading import load_frozen
from huarizo.training.progress import Terminal
from huarizo.training.trainer import LoraTrainer, training_arguments


def main(model_name: str, data_name: str) -> None:
    recipe = make_recipe(
        model=model_name,
        data={"train": data_name, "prompt": "alpaca", "max_length": 512},
        lora={"r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        training={"epochs": 1, "batch_size": 4, "learning_rate": 2e-4},
        trainer={"logging_steps": 10},
    )

    # 1. Log in, where it is needed, and fetch the model: HF_TOKEN, a .env file, or `hf auth login`.
    model_folder = resolve_model(recipe.model).path

    # 2. Read the rows and choose the prompt: "### Instruction:", "### Input:" where there is one, "### Response:".
    rows = require_good(read_rows(resolve_data(data_name).files), "fail")
    tokenizer = load_tokenizer(model_folder)
    prompt = prompt_format(recipe.data.prompt, tokenizer)

    # 3. Tokenise: the response is learnt, with the token that ends it; the prompt is only read.
    encoder = Encoder(tokenizer, prompt, labels="response", max_length=recipe.data.max_length)
    data = tokenise(rows, encoder, cache_folder() / "tokens").dataset

    # 4. Load the base model, frozen, in 8 bit or in the number format that this machine is fastest in.
    precision = choose_precision("auto", device())
    model = load_frozen(model_folder, precision, data)

    # 5. Add LoRA: two small trained matrices beside each chosen layer.
    model = add_lora(model, recipe.lora, recipe.training.seed)
    print(f"{model.num_parameters(only_trainable=True):,} of {count_weights(model):,} parameters are trained")

    # 6. Train, and save the adapter. Rows of a step are packed without padding.
    run = new_run(recipe.output, "script")
    arguments = training_arguments(recipe, run, precision, device())
    events = Events([Terminal(Console())])
    LoraTrainer(model, arguments, data, [], recipe, budget=2048, events=events).train()
    model.save_pretrained(str(run.adapter))
    tokenizer.save_pretrained(run.adapter)
    print(f"done: {run.adapter}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--quickstart"]:
        main("quickstart", "quickstart")
    elif len(sys.argv) <= 2:
        main("TinyLlama/TinyLlama-1.1B-Chat-v1.0", sys.argv[1] if len(sys.argv) == 2 else "alpaca_data.json")
    else:
        print(__doc__)
