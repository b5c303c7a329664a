"""Scenes as JSON answers: the schema that an answer is held to, and the true answer of a scene."""

from __future__ import annotations

import json
from typing import Any

from vlmfast.pocket.scenes import BACKGROUNDS, COLOUR_NAMES, NEEDLE, PLACES, SHAPES, SIZES, Scene

WHERE = tuple(place.replace(" ", "-") for place in PLACES)  # the pocket tokenizer has no token for a space
QUESTION = "describe the objects"


def schema() -> dict[str, Any]:
    """The JSON schema of a still scene: its background, and of one to four objects size, colour, shape and place."""
    values = {"size": SIZES, "colour": COLOUR_NAMES, "shape": (*SHAPES, NEEDLE), "where": WHERE}
    entry = _closed({key: {"enum": list(allowed)} for key, allowed in values.items()})
    objects = {"type": "array", "items": entry, "minItems": 1, "maxItems": 4}
    return _closed({"background": {"enum": list(BACKGROUNDS)}, "objects": objects})


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties, all of them and no other."""
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


def scene_json(scene: Scene) -> str:
    """The true answer, without spaces, objects in reading order of their places."""
    objects = [
        {"size": obj.size, "colour": obj.colour, "shape": obj.shape, "where": WHERE[obj.cell]}
        for obj in sorted(scene.objects, key=lambda obj: (obj.cell, obj.x))
    ]
    return json.dumps({"background": scene.backgrounds[0].kind, "objects": objects}, separators=(",", ":"))
