"""A recipe in words."""

from huarizo.recipe import Recipe
from huarizo.recipe_help import fields, type_of


def test_every_setting_has_a_type_and_a_line_of_help() -> None:
    settings = dict(fields(Recipe))
    assert {"model", "data.train", "lora.r", "training.seed", "precision", "output", "trainer"} <= settings.keys()
    for key, field in settings.items():
        assert field.description and type_of(field), key


def test_types_and_ranges_in_words() -> None:
    settings = dict(fields(Recipe))
    assert type_of(settings["lora.r"]) == "integer, >= 1, <= 4096"
    assert type_of(settings["data.on_bad_row"]) == "fail | skip"
    assert type_of(settings["training.max_steps"]) == "integer or null, >= 1"
