"""Damaged files of every kind that bnpatch reads, by seed; whatever is wrong, the only error is BnpatchError.

``tests/test_fuzz.py`` opens some hundreds, ``python -m tests.benchmarks.fuzz`` as many as you like.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bnpatch
from bnpatch.core.recipe import Recipe
from bnpatch.data.class_maps import read_class_map
from tests.fuzzing.checkpoints import (
    checkpoint_values,
    checkpoints,
    hub_configs,
    load_hub_folder,
    pickled_bytes,
    recipes,
    safetensors,
    safetensors_header,
)
from tests.fuzzing.damage import BYTES, Damage, json_values, repeated
from tests.fuzzing.data import (
    array_bytes,
    arrays,
    class_maps,
    json_class_maps,
    pictures,
    read_examples,
    read_picture,
)
from tests.fuzzing.graphs import (
    exported_graphs,
    light_graphs,
    metadata,
    patch_graph,
    renamed,
    small_graphs,
    structural,
)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: the name of the file.
        originals: returns contents that bnpatch reads without an error.
        damages: what to do to them; :data:`BYTES` treats them as bytes, others know their structure.
        use: opens the file, as commands do.
    """

    name: str
    originals: Callable[[], list[bytes]]
    damages: tuple[Damage, ...]
    use: Callable[[Path], object]

    def damaged(self, seed: int) -> bytes:
        """The content number ``seed``."""
        rng = random.Random(seed)
        damage = rng.choice(self.damages)
        return damage(rng.choice(self.originals()), rng)


KINDS = {
    "ONNX, small": Kind("m.onnx", small_graphs, (*BYTES, structural, structural, renamed), patch_graph),
    "ONNX, light": Kind("m.onnx", light_graphs, (*BYTES, structural, structural, renamed), patch_graph),
    "ONNX, exported": Kind("m.onnx", exported_graphs, (*BYTES, structural, structural, renamed), patch_graph),
    "ONNX, as a model": Kind("m.onnx", exported_graphs, (structural, metadata), bnpatch.load),
    "checkpoint": Kind("m.pt", checkpoints, (*BYTES, pickled_bytes, checkpoint_values), bnpatch.load),
    "safetensors": Kind("m.safetensors", safetensors, (*BYTES, safetensors_header), bnpatch.load),
    "configuration": Kind("config.json", hub_configs, (*BYTES, json_values, json_values), load_hub_folder),
    "recipe": Kind("recipe.json", recipes, (*BYTES, json_values, json_values), Recipe.load),
    ".npz": Kind("data.npz", arrays, (*BYTES, array_bytes), read_examples),
    "image": Kind("image.png", pictures, BYTES, read_picture),
    "class map": Kind("classes.txt", class_maps, (*BYTES, repeated), read_class_map),
    "class map, JSON": Kind("classes.json", json_class_maps, (*BYTES, repeated, json_values), read_class_map),
}
