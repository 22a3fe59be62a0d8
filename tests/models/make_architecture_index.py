"""Write bnpatch/models/architectures.json: the architectures of timm and torchvision by their tensor names.

Run it after an update of either library (some minutes): ``python -m tests.models.make_architecture_index``.
"""

import collections
import json
from pathlib import Path

import bnpatch
from bnpatch.models.architecture import LIBRARIES, Architecture, known_names, names_hash


def plainness(entry):
    library, _, name = entry.partition(":")
    return LIBRARIES.index(library), len(name), name


def main():
    index = collections.defaultdict(list)
    for library in LIBRARIES:
        for name in known_names(library):
            try:
                model = Architecture(library, name).sketch()
            except Exception as error:
                print(f"{library}:{name} can't be built: {error}")
                continue
            index[names_hash(model.state_dict())].append(f"{library}:{name}")
    # The plainest name first: it is taken where several fit.
    lines = [
        f"  {json.dumps(key)}: {json.dumps(sorted(names, key=plainness))}"
        for key, names in sorted(index.items())
    ]
    path = Path(bnpatch.__file__).parent / "models" / "architectures.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{sum(map(len, index.values()))} architectures in {path.name}")


if __name__ == "__main__":
    main()
